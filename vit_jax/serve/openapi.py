"""The interface over HTTP as an OpenAPI document, and as a page that needs nothing from elsewhere."""

import html
import json
from collections.abc import Mapping
from typing import Any

KINDS = {int: "integer", float: "number", bool: "boolean"}
ERRORS = {
    400: "No images, an image that cannot be decoded, or an option that there is not.",
    408: "The request did not arrive in time.",
    413: "Too many bytes or images.",
    415: "Neither multipart/form-data nor application/json.",
    500: "The model gave no numbers, or an error of the server.",
    503: "Too many wait. The header Retry-After has seconds.",
    504: "There was no answer in time.",
}
NUMBER, TEXT = {"type": "number"}, {"type": "string"}
BOX = {"type": "array", "items": NUMBER, "description": "left, top, right, bottom in pixels"}
WISHES = {
    "attention": {
        "type": "object",
        "description": "Where the model looks: rows of patches, and the part of the image that they cover.",
        "properties": {"map": {"type": "array", "items": {"type": "array", "items": NUMBER}}, "box": BOX},
    },
    "maps": {"type": "object", "description": "Pictures by name, as PNG.", "additionalProperties": TEXT | {"format": "byte"}},
}
"""What is in a result if the option of its name is true."""
RESULTS = {
    "classify": {
        "predictions": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {"label": TEXT, "index": {"type": "integer"}, "probability": NUMBER},
            },
        }
    },
    "detect": {
        "objects": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "label": TEXT,
                    "score": NUMBER,
                    "box": BOX,
                },
            },
        }
    },
    "segment": {
        "areas": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "label": TEXT,
                    "index": {"type": "integer"},
                    "pixels": {"type": "integer"},
                    "share": NUMBER,
                },
            },
        }
    },
    "caption": {"caption": TEXT, "score": NUMBER},
    "contrast": {"embedding": {"type": "array", "items": NUMBER}},
}


def specification(model: Mapping[str, Any]) -> dict[str, Any]:
    """The document for a model, of which `Service.describe` tells."""
    options = {name: _option(default) for name, default in model["options"].items()}
    json_body = _object({"images": {"type": "array", "items": TEXT | {"format": "byte"}}, **options}, ["images"])
    form_body = _object({"image": {"type": "array", "items": TEXT | {"format": "binary"}}, **options}, ["image"])
    size = {name: {"type": "integer"} for name in ("width", "height")}
    size |= {name: schema for name, schema in WISHES.items() if name in options}
    result = _object({"image": TEXT, **size, **RESULTS.get(model["task"], {})})
    predict = {
        "summary": "Predictions for one or several images",
        "requestBody": {
            "required": True,
            "content": {"multipart/form-data": {"schema": form_body}, "application/json": {"schema": json_body}},
        },
        "responses": {
            "200": _response("One result an image, in order.", _object({"results": {"type": "array", "items": result}})),
            **{str(status): _response(about, _object({"error": TEXT})) for status, about in ERRORS.items()},
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": model["model"], "version": "1"},
        "paths": {
            "/v1/predict": {"post": predict},
            "/v1/model": {"get": _get("The model, its options and limits", "application/json")},
            "/healthz": {"get": _get("200 while the server answers", "application/json")},
            "/metrics": {"get": _get("Counters in Prometheus' text format", "text/plain")},
        },
    }


def page(document: Mapping[str, Any], address: str) -> str:
    """The document in HTML, with an example for a server at this address, which ends with a slash."""
    parts = []
    for path, methods in document["paths"].items():
        for method, about in methods.items():
            parts.append(f"<section><h2><b>{method.upper()}</b> {path}</h2><p>{html.escape(about['summary'])}</p>")
            for kind, body in about.get("requestBody", {}).get("content", {}).items():
                parts.append(f"<h3>Body: {kind}</h3>{_pre(body['schema'])}")
            fine, *failures = about["responses"].items()
            if schema := next(iter(fine[1]["content"].values())).get("schema"):
                parts.append(f"<h3>Answer</h3><p>{fine[1]['description']}</p>{_pre(schema)}")
            if failures:
                rows = "".join(f"<tr><th scope=row>{status}<td>{answer['description']}" for status, answer in failures)
                parts.append(f"<h3>Errors</h3><p>As JSON, {{&quot;error&quot;: …}}.</p><table>{rows}</table>")
            parts.append("</section>")
    values = {"title": html.escape(document["info"]["title"]), "address": html.escape(address), "body": "".join(parts)}
    return _PAGE.format_map(values)


def _option(default: Any) -> dict[str, Any]:
    if isinstance(default, tuple):
        return {"type": "array", "items": TEXT}
    return {"type": KINDS[type(default)], "default": default}


def _object(properties: Mapping[str, Any], required: list[str] | None = None) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties)} | ({"required": required} if required else {})


def _response(about: str, schema: Mapping[str, Any]) -> dict[str, Any]:
    return {"description": about, "content": {"application/json": {"schema": schema}}}


def _get(summary: str, kind: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": summary, "content": {kind: {}}}}}


def _pre(schema: Mapping[str, Any]) -> str:
    return f"<pre tabindex=0>{html.escape(json.dumps(schema, indent=2))}</pre>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}: HTTP</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 50rem; margin: 0 auto; padding: 1rem; }}
section {{ border-top: 1px solid #8886; }} h2 {{ font-size: 1.2rem; }} h3 {{ font-size: 1rem; margin: 1rem 0 0; }}
p {{ margin: .2rem 0; }}
th {{ padding-right: 1rem; text-align: left; vertical-align: top; }}
pre {{ overflow: auto; background: #8882; padding: .8rem; border-radius: .5rem; font-size: .85rem; }}
h2 b {{ background: #2457d6; color: #fff; padding: .1rem .5rem; border-radius: .3rem; font-size: .9rem; }}
</style></head><body><main>
<h1>{title}</h1>
<p><a href="/">The page</a> · <a href="/openapi.json">openapi.json</a></p>
<pre tabindex=0>curl -F image=@cat.jpg -F image=@dog.jpg {address}v1/predict</pre>
{body}
</main></body></html>
"""
