"""A hook of MkDocs: links to files outside docs/ lead to the repository, or become plain text where none is named."""

import re

OUTSIDE = re.compile(r"(?<!!)\[([^\]]*)\]\(((?:\.\./)[^)#\s]*)(#[^)]*)?\)")


def on_page_markdown(markdown, config, **_):
    def to_repository(link):
        text, path, anchor = link.groups()
        if not config["repo_url"]:
            return text
        return f"[{text}]({config['repo_url'].rstrip('/')}/blob/main/{path.removeprefix('../')}{anchor or ''})"

    return OUTSIDE.sub(to_repository, markdown)
