"""The page at `/docs`: the OpenAPI document as plain HTML, without a script and without a file from elsewhere.

Unit of data: one page, made at its first request.
"""

from __future__ import annotations

from functools import cache
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse


def add_docs(app: FastAPI) -> None:
    """Serve the page."""

    @cache
    def page() -> str:
        return docs_html(app.openapi())

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page())


def docs_html(schema: dict[str, Any]) -> str:
    """The page for an OpenAPI document: every route with its parameters, bodies and answers."""
    title = escape(f"{schema['info']['title']} {schema['info']['version']}")
    routes = [
        _operation(path, method, operation) for path, operations in schema["paths"].items() for method, operation in operations.items()
    ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title></head><body>'
        f"<main><h1>{title}</h1><p>{escape(schema['info'].get('description', ''))}"
        ' For programs: <a href="/openapi.json">openapi.json</a>. To try an image: <a href="/">the page</a>.</p>'
        f"{''.join(routes)}</main></body></html>\n"
    )


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2>{method.upper()} {escape(path)}</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in operation.get("description", "").split("\n\n")]
    if operation.get("security"):
        parts.append("<p>Needs an API key: <code>Authorization: Bearer KEY</code> or <code>X-API-Key: KEY</code>.</p>")
    parameters = [
        (entry["name"], entry.get("description") or entry["schema"].get("description", "")) for entry in operation.get("parameters", ())
    ]
    parts += _list("Parameters", parameters)
    parts += _list("Bodies", [(name, "") for name in operation.get("requestBody", {}).get("content", {})])
    parts += _list("Answers", [(status, answer.get("description", "")) for status, answer in sorted(operation["responses"].items())])
    return "".join(parts)


def _list(title: str, rows: list[tuple[str, str]]) -> list[str]:
    if not rows:
        return []
    return [f"<h3>{title}</h3><dl>", *(f"<dt><code>{escape(name)}</code></dt><dd>{escape(text)}</dd>" for name, text in rows), "</dl>"]
