"""The web pages: `/` to try the server, `/docs` for its interface. Plain files, nothing from other servers."""

from pathlib import Path

from fastapi import APIRouter, Response

from gakernels.server.web import ApiError

FOLDER = Path(__file__).with_name("page")
_TYPES = {".css": "text/css", ".html": "text/html", ".js": "text/javascript", ".svg": "image/svg+xml"}
# A browser takes files and answers from this server alone, and lets no text become HTML or script.
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def page_routes() -> APIRouter:
    """The routes of the pages and of their files. They need no key, because they hold no user data."""
    router = APIRouter(include_in_schema=False)
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if path.suffix in _TYPES}

    @router.get("/page/{name}")
    async def file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, "Not Found")
        return Response(files[name], media_type=_TYPES[Path(name).suffix], headers=HEADERS)

    @router.get("/")
    async def page() -> Response:
        return await file("index.html")

    @router.get("/docs")
    async def docs() -> Response:
        return await file("docs.html")

    return router
