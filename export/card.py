"""The model card, made from config.json alone: what the model is, how it was trained, where it is accurate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from export.figure import accuracy_figure
from training.report.sentences import summary
from zoo.labels import GROUPS, UNKNOWN, meaning_of
from zoo.model_folder import CARD, FIGURE, ModelFolder, add_files
from zoo.registry import citation

METHODS = {
    "metasaug": "MetaSAug: the second stage augments each class's features along a covariance that is learned on a "
                "small balanced meta set, and re-weights the classes",
    "isda": "ISDA: the second stage augments each class's features along its running covariance, and re-weights the "
            "classes",
    "heldout": "Held-out augmentation: the second stage augments each class's features by how far held-out pictures (a "
               "small balanced set) lie from its training mean, and re-weights the classes",
    **dict.fromkeys(("logit-adjustment", "balanced-softmax"), "Logit adjustment: training adds the log of each class's "
                    "frequency to its logit, so rare classes are not outweighed"),
    "classifier-balancing": "Weights of classifier-balancing (Kang et al. 2020), which trains features and classifier "
                            "separately",
}


def write_card(path: str | Path) -> None:
    """Write README.md and its figure into a model folder, replacing older ones."""
    folder = ModelFolder(path)
    figure = accuracy_figure(folder.config)
    add_files(folder.path, {CARD: card(folder.config, figure=figure is not None).encode(),
                            **({FIGURE: figure} if figure else {})},
              {name: entry for name, entry in folder.files.items() if name != FIGURE})


def card(config: Mapping[str, Any], repo: str | None = None, figure: bool = False) -> str:
    """Markdown with the Hub's YAML on top.

    repo    owner/name, if the card is for a repository on the Hub
    figure  whether accuracy.png is beside the card
    """
    ours = config["metasaug"]
    parts = [
        f"---\n{_card_data(config).to_yaml()}\n---",
        f"# {ours['name']}",
        _what_it_is(config),
        *_in_short(config),
        *_results(ours, figure),
        *_calibration(ours),
        _use(config, repo),
        *_variants(ours),
        _origin(ours) if ours.get("imported") else _training(ours),
        _limits(config),
        f"## Citation\n\n```bibtex\n{citation()}```",
    ]
    return "\n\n".join(parts) + "\n"


def results_of(ours: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Test results from the end of training, or else of the ONNX file, measured by `metasaug export --data`."""
    exported = (ours.get("variants") or {}).get("fp32") or {}
    return ours.get("results") or (exported if "groups" in exported else None)


def _card_data(config: Mapping[str, Any]) -> ModelCardData:
    ours = config["metasaug"]
    results = results_of(ours)
    where = _data_in_words(ours)
    evaluations: list[EvalResult] = []
    if results:
        figures = {"accuracy": 1 - results["error"], "macro accuracy": 1 - results["macro_error"],
                   **{f"accuracy ({g} classes)": r["accuracy"] for g, r in results["groups"].items()
                      if r["accuracy"] is not None}}
        evaluations = [
            EvalResult(task_type="image-classification", dataset_name=where, dataset_split="test",
                       dataset_type=ours.get("recipe", {}).get("dataset", "own-pictures"), metric_type="accuracy",
                       dataset_args={"imbalance": ours["imbalance"]} if ours.get("imbalance") else None,
                       metric_name=name, metric_value=round(value, 4))
            for name, value in figures.items()
        ]
    return ModelCardData(
        model_name=ours["name"], license=_licence(ours), library_name="metasaug", pipeline_tag="image-classification",
        tags=["long-tailed-recognition", "imbalanced", ours["method"], config["architecture"], "onnx"],
        eval_results=evaluations or None,
    )


def _data_in_words(ours: Mapping[str, Any]) -> str:
    imbalance = ours.get("imbalance")
    return ours["dataset"] + (f", imbalance {imbalance:.3g}" if imbalance else "")


def _what_it_is(config: Mapping[str, Any]) -> str:
    ours, counts = config["metasaug"], config["metasaug"].get("class_counts")
    method = METHODS.get(ours["method"], f"Plain training with the loss `{ours.get('loss', ours['method'])}`, no "
                                         "augmentation of features")
    if start := ours.get("start"):
        method = (f"It started from `{start['network']}`, trained on {start['learned_on']} (weights under "
                  f"{start['licence']}). {method}")
    tail = "The number of training pictures per class is not known."
    if counts:
        rare = min(counts)
        tail = (f"It saw {sum(counts):,} training pictures: {max(counts):,} of the most frequent class, {rare:,} of "
                "the rarest.")
    return (f"A `{config['architecture']}` that recognises {config['num_classes']} classes, trained on "
            f"**{_data_in_words(ours)}**. {tail}\n\n{method}. Schedule: {ours.get('schedule', 'not known')}.")


def _in_short(config: Mapping[str, Any]) -> list[str]:
    """What the model knows, how well, where it fails and what a probability means, for readers who train no models."""
    ours, results = config["metasaug"], config["metasaug"].get("results")
    calibration = ours.get("calibration") or {}
    strange = ("`familiarity` is low for pictures unlike anything in training." if calibration else
               "Nothing marks pictures unlike anything in training.")
    said = [f"**What it knows.** {config['num_classes']} classes. It names one of them for any picture, even one that "
            f"shows none of them. {strange}"]
    if results:
        overall, groups, weak = summary(config, results)
        said += [f"**How well.** {overall} The test pictures come from the same source as the training pictures: "
                 "expect less from another camera or place.",
                 f"**Where it fails.** By group: {groups} {weak}"]
        if measured := calibration.get("measured"):
            said.append("**What a probability means.** Of the answers given with 80 %, about 80 % are correct if "
                        "classes are as frequent as `prior` says. On the test pictures the two differ by "
                        f"{measured['ece']['after']['all']:.1%} on average. `p.set(0.9)` names enough classes to "
                        "contain the true one nine times in ten.")
        elif "ece" in results:
            said.append("**What a probability means.** Not calibrated: probability and share of correct answers "
                        f"differ by {results['ece']:.1%} on average over the test pictures. Use it to sort answers.")
    return ["## In short\n\n" + "\n".join(f"- {line}" for line in said)]


def _results(ours: Mapping[str, Any], figure: bool) -> list[str]:
    results = ours.get("results")
    if not results:
        published, source = ours.get("published_error"), ours.get("published_source", "the paper")
        return ["## Results\n\n"
                + ("Not measured in training; the ONNX files were, see below." if results_of(ours) else
                   "Not measured by us.")
                + (f" Published: {published:.2%} error ({source})." if published else "")]
    seed = f" (seed {ours['seed']})" if ours.get("seed") is not None else ""
    lines = [
        "## Results", "",
        f"Last epoch, one run{seed}, {results['images']:,} test pictures of {ours['dataset']}: "
        f"**error {results['error']:.2%}**, macro error {results['macro_error']:.2%}, "
        f"worst class {results['worst_class_error']:.2%}.",
    ]
    if ours.get("published_error") is not None:
        lines += ["", f"The paper reports {ours['published_error']:.2%} for this setting, on the original pictures, "
                      "after 200 epochs, at the best test epoch. That is another measurement: do not compare digits."]
    groups = [f"{group}: {meaning_of(group, ours['groups_by'])}" for group in (*GROUPS, UNKNOWN)
              if group in results["groups"]]
    lines += ["", f"Groups of classes: {', '.join(groups)}. Intervals: 95 %, Wilson.", "",
              "| group | classes | correct | test pictures | accuracy | interval |", "|---|---|---|---|---|---|"]
    for group in (*GROUPS, UNKNOWN):
        if group in results["groups"]:
            r = results["groups"][group]
            accuracy = "–" if r["accuracy"] is None else f"{r['accuracy']:.1%}"
            low, high = r["interval"]
            lines.append(f"| {group} | {r['classes']} | {r['correct']:,} | {r['images']:,} | {accuracy} | "
                         f"{low:.1%} to {high:.1%} |")
    if figure:
        lines += ["", "![Accuracy of each class beside its training pictures, of the groups, and of answers beside "
                      f"their probability]({FIGURE})"]
    per_class = ["### Per class", "", "| class | group | training pictures | correct | test pictures |",
                 "|---|---|---|---|---|"]
    for row, group in zip(results["per_class"], ours["groups"], strict=True):
        trained = "?" if row["train_images"] is None else f"{row['train_images']:,}"
        per_class.append(f"| {_cell(row['label'])} | {group} | {trained} | {row['correct']:,} | "
                         f"{row['test_images']:,} |")
    return ["\n".join(lines), "\n".join(per_class)]


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _calibration(ours: Mapping[str, Any]) -> list[str]:
    """How far its probabilities can be trusted, per group."""
    found = ours.get("calibration")
    if not found:
        return []
    lines = ["## Calibration", "",
             f"Logits are divided by the temperature {found['temperature']:.3f}, fitted on {found['images']:,} "
             f"pictures ({found['data']})."]
    if figures := found.get("measured"):
        ece, sets, risk = figures["ece"], figures["coverage"], figures["risk"]
        lines[-1] += (f" Measured on {figures['images']:,} test pictures, with their class frequencies as the prior. A "
                      f"prediction set (`p.set({sets['asked']})`) should contain the true class for "
                      f"{sets['asked']:.0%} of the pictures of each class.")
        lines += ["", "| true class | calibration error before | after | true class in the set | classes in a set |",
                  "|---|---|---|---|---|"]
        lines += [f"| {group} | {ece['before'][group]:.1%} | {ece['after'][group]:.1%} | "
                  f"{sets[group]['coverage']:.1%} | {sets[group]['size']:.2f} |"
                  for group in (*GROUPS, "all") if group in sets]
        lines += ["", "| surest pictures | " + " | ".join(f"{share:.0%}" for share, _ in risk) + " |",
                  "|---" * (1 + len(risk)) + "|",
                  "| error | " + " | ".join(f"{error:.1%}" for _, error in risk) + " |"]
        if strange := figures.get("strange"):
            lines += ["", f"Pictures of none of its classes ({strange['images']:,} of {strange['pictures']}): it calls "
                          f"{strange['called']:.0%} of them unlike anything in training. It wrongly says so of "
                          f"{strange['falsely_called']:.0%} of the test pictures (AUROC {strange['auroc']:.2f})."]
    return ["\n".join(lines)]


def _use(config: Mapping[str, Any], repo: str | None) -> str:
    ours, cfg = config["metasaug"], config["pretrained_cfg"]
    _, height, width = cfg["input_size"]
    # The zoo may have our own weights under an imported model's name.
    where = (f'"hf:{repo}")' if repo else '"PATH/OF/THIS/FOLDER")' if ours.get("imported") else
             f'"{ours["name"]}")      # or the path of this folder')
    since = f" {ours['onnxruntime']} or newer" if ours.get("onnxruntime") else ""
    return f"""## Use

```python
import zoo
model = zoo.load({where}
print(model.predict("photo.jpg"))
```

Without our package: `onnx/model.onnx` in plain onnxruntime{since}. Input `pictures`, float32
(batch, 3, {height}, {width}), RGB, (x / 255 - mean) / std with mean {[round(x, 4) for x in cfg['mean']]} and
std {[round(x, 4) for x in cfg['std']]}. Outputs `logits`, `features` and, if `features` is its mean, `feature_map`.
The file's metadata holds the labels, exact mean and std, the preprocessing in words, and this whole configuration."""


def _training(ours: Mapping[str, Any]) -> str:
    rows = {
        "command": f"`{ours['command']}`" if ours.get("command") else None,
        "data": ours["dataset"],
        "seed": ours.get("seed"),
        "code": ours.get("code_version"),
        "versions": ", ".join(f"{k} {v}" for k, v in ours.get("versions", {}).items()) or None,
        "hardware": ours.get("hardware"),
        "time": f"{ours['seconds'] / 60:.0f} minutes" if ours.get("seconds") else None,
    }
    table = "\n".join(f"| {name} | {_cell(str(value))} |" for name, value in rows.items() if value is not None)
    return f"## Training\n\n| | |\n|---|---|\n{table}"


def _variants(ours: Mapping[str, Any]) -> list[str]:
    """Accuracy of each ONNX file, side by side: quantisation may cost rare classes more than frequent ones."""
    variants = ours.get("variants") or {}
    if not variants:
        return []
    names = [name for name in ("fp32", "int8") if name in variants]
    measured = {name: variants[name] for name in names if "groups" in variants[name]}
    parts = ["## Variants"]
    if measured:
        images = ", ".join(f"{n:,}" for n in sorted({v["images"] for v in measured.values()}))
        groups = [g for g in (*GROUPS, UNKNOWN) if any(g in v["groups"] for v in measured.values())]

        def row(title: str, share) -> str:
            return f"| {title} | " + " | ".join(
                "–" if share(v) is None else f"{share(v):.2%}" for v in measured.values()) + " |"

        parts.append("\n".join([
            f"Each ONNX file, measured by `metasaug export --data` in ONNX Runtime on {images} test pictures.", "",
            "| | " + " | ".join(measured) + " |", "|---" * (1 + len(measured)) + "|",
            row("error", lambda v: v["error"]), row("macro error", lambda v: v["macro_error"]),
            row("worst class, error", lambda v: v["worst_class_error"]),
            *(row(f"{g}, accuracy", lambda v, g=g: v["groups"].get(g, {}).get("accuracy")) for g in groups)]))
    if "int8" in variants:
        pictures = variants["int8"].get("calibration_pictures")
        ranges = f", ranges from {pictures:,} calibration pictures" if pictures else ""
        parts.append(
            '`onnx/model_int8.onnx`, `zoo.load(..., precision="int8")`: a third of the size or less, for the CPU; '
            f"statically quantised, weights per channel{ranges}."
            + ("" if "int8" in measured else " Its accuracy was not measured."))
    return parts


def _origin(ours: Mapping[str, Any]) -> str:
    """Where imported weights come from."""
    imported = ours["imported"]
    whose = (f" ({imported['origin']}; licence {imported['licence'].upper()})." if imported["origin"] != "unknown"
             else "; its layout does not show whose it is, or under which licence.")
    lines = [f"## Origin\n\n**Not trained by us.** Every weight is from `{imported['file']}` (sha256 "
             f"`{imported['sha256']}`), as its authors released it{whose}"]
    if imported.get("stated_error") is not None:
        lines.append(f"The file itself states a best test error of {imported['stated_error']:.2%}"
                     + (", and it has that error on the original test pictures." if imported.get("released_file")
                        else "."))
    if ours["class_counts"]:
        lines.append(f"Training pictures per class: from {imported['counts_from']}.")
    return " ".join([*lines, *imported["notes"]])


def _licence(ours: Mapping[str, Any]) -> str:
    return ours["imported"]["licence"] if ours.get("imported") else "mit"


def _assumes(prior: str | list[float] | None) -> str:
    """What the model's probabilities assume, in words."""
    ratio = max(prior) / min(prior) if isinstance(prior, list) else 1.0
    if prior is None:
        return ""
    if prior == "train":
        return ("Its probabilities assume that classes are as frequent as in training; "
                'use `predict(..., prior="uniform")` if all are equally frequent.')
    assumed = ("all classes are equally frequent" if ratio < 1.05 else
               f"the most frequent class is {ratio:.3g} times as frequent as the rarest (`prior` in config.json)")
    return (f"Its probabilities assume that {assumed}; "
            'use `predict(..., prior="train")` if classes are as frequent as in training.')


def _limits(config: Mapping[str, Any]) -> str:
    ours = config["metasaug"]
    _, height, width = config["pretrained_cfg"]["input_size"]
    assumes = _assumes(ours.get("prior"))
    jpeg = ("\n- Trained and tested on JPEG copies of CIFAR-10: do not compare its errors with errors on the original "
            "pictures." if "JPEG" in ours["dataset"] else "")
    fitted = {"squash": "squashed to that, whatever their shape", "border": "scaled down whole, on a border"}.get(
        config["pretrained_cfg"].get("crop_mode", "center"), "scaled down and cropped to their centre")
    how_much = "; the table above says how much" if ours.get("results") else ""
    return f"""## Intended use and limits

For research on long-tailed recognition and as an example of the method.

- It sees {width} x {height} pixels; larger pictures are {fitted}.
- Rare classes are less reliable{how_much}. {assumes}{jpeg}
- It was not tested for safety-critical use.

Licence: {_licence(ours).upper()}. This folder holds no training pictures."""
