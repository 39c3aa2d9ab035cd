"""The frame of a report: one HTML page that asks for nothing else, in the reader's light or dark scheme.

The browser is told to refuse every request, and every script but the page's own, which it knows by its hash.
"""

import base64
import hashlib
from html import escape

from flux2_relay.pipeline.page_script import SCRIPT
from flux2_relay.pipeline.page_style import STYLE

_HASH = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_HASH}'"


def page(title: str, body: str, live: bool = False) -> str:
    """A whole page around `body`, which is HTML already; `title` is plain text, a `live` page reloads itself."""
    reload = '<noscript><meta http-equiv="refresh" content="60"></noscript>\n' if live else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n{reload}'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body{' data-live' if live else ''}>\n"
        f"<main>\n{body}\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
