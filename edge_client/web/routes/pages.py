"""The page, and the health checks of operators."""

from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from edge_client.web.dependencies import SharedGateway

STATIC = Path(__file__).parents[1] / "static"
router = APIRouter()


@router.get("/healthz", tags=["operation"])
async def healthz() -> dict[str, str]:
    """Whether the process answers."""
    return {"status": "ok"}


@router.get("/readyz", tags=["operation"], response_model=dict[str, Any])
async def readyz(gateway: SharedGateway) -> Any:
    """Whether the gateway takes jobs. It does so without a cloud, too: this device then runs all steps."""
    found, message = await gateway.watch.poll(wait_s=0.5)
    return {"status": "ok", "cloud_reachable": found is not None, "cloud_message": message, **gateway.queue.load}


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(STATIC / "index.html")


@router.get("/favicon.ico", include_in_schema=False)
async def icon() -> FileResponse:
    """Its icon."""
    return FileResponse(STATIC / "icon.svg", media_type="image/svg+xml")
