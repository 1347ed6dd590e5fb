"""The documentation of an HTTP application, from files that BentoML carries: it works without a network."""

from fastapi import FastAPI, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html
from starlette.staticfiles import StaticFiles

STATIC = "/static_content"


def add_documentation(app: FastAPI) -> None:
    """Swagger UI of `app` at /docs. `app` is made without pages of its own for that."""
    app.add_api_route("/docs", docs, methods=["GET"], include_in_schema=False)
    app.mount(STATIC, StaticFiles(packages=[("bentoml", "_internal/server/static_content")]))


async def docs(request: Request) -> Response:
    """Swagger UI."""
    return get_swagger_ui_html(
        openapi_url="/openapi.json",
        title=request.app.title,
        swagger_js_url=f"{STATIC}/swagger-ui-bundle.js",
        swagger_css_url=f"{STATIC}/swagger-ui.css",
        swagger_favicon_url=f"{STATIC}/favicon-light-32x32.png",
    )
