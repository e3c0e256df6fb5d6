# The demo:      docker build -t metasaug . && docker run -p 7860:7860 metasaug
# Training:      docker build -t metasaug-train --target train . && docker run --gpus all -v "$PWD:/work" metasaug-train \
#                    train folder --data pictures --out runs/mine
FROM python:3.11-slim AS base
RUN useradd --create-home user
WORKDIR /app
COPY . .

FROM base AS train
RUN pip install --no-cache-dir --constraint constraints.txt '.[train]'
USER user
WORKDIR /work
ENTRYPOINT ["metasaug"]

FROM base AS demo
RUN pip install --no-cache-dir --constraint constraints.txt '.[demo]'
USER user
EXPOSE 7860
CMD ["metasaug", "demo", "--host", "0.0.0.0"]
