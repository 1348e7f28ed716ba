"""Edge bundles to hand out: what is in them, and their files in chunks.

Knows nothing of what a bundle is for: sizes and hashes come from its manifest.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from cloud_server.logs import note
from cloud_server.rpc.worker_pool import WorkerPool
from cloud_server.rpc.write_stream import write
from hybridsd.errors import Reason
from hybridsd.manifest import MANIFEST_NAME, BundleFile, describe_file, read_manifest
from hybridsd.v1 import bundle_service_pb2 as pb
from hybridsd.v1 import bundle_service_pb2_grpc, denoising_service_pb2

CHUNK_BYTES = 1 << 20
FILE_THREADS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Bundle:
    """A folder of files for edge devices."""

    name: str
    latent_space: str
    folder: Path
    files: tuple[BundleFile, ...]
    """The manifest first."""
    max_timestep: float | None = None
    """The highest that it has a U-Net for; None: all."""

    def info(self) -> denoising_service_pb2.BundleInfo:
        """Returns the bundle as `GetCapabilities` lists it."""
        files = [
            denoising_service_pb2.BundleFile(
                path=file.path, size_bytes=file.size_bytes, sha256=bytes.fromhex(file.sha256)
            )
            for file in self.files
        ]
        return denoising_service_pb2.BundleInfo(
            name=self.name, latent_space=self.latent_space, files=files, max_timestep=self.max_timestep
        )


def load_bundle(folder: Path) -> Bundle:
    """Reads the manifest of a bundle; hashes are taken from it, sizes are checked.

    Raises:
        InvalidRequest: MANIFEST_INVALID, saying what is wrong.
    """
    manifest = read_manifest(folder)
    files = {file.path: file for file in manifest.files.values()}
    for file in files.values():
        path = folder / file.path
        if not path.is_file() or path.stat().st_size != file.size_bytes:
            raise Reason.MANIFEST_INVALID.error(
                f"{path} is missing or has not the {file.size_bytes} bytes of the manifest; export the bundle again",
                field="bundle",
            )
    return Bundle(
        name=manifest.name,
        latent_space=manifest.latent_space,
        folder=folder,
        files=(describe_file(folder, MANIFEST_NAME), *files.values()),
        max_timestep=manifest.highest_timestep,
    )


class BundleService(bundle_service_pb2_grpc.BundleServiceServicer):
    """`hybridsd.v1.BundleService`."""

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self._bundles = {bundle.name: bundle for bundle in bundles}
        self._files = WorkerPool("files", FILE_THREADS)  # each stream has one piece of work at a time
        self.num_streams = 0

    def close(self) -> None:
        """Ends downloads at their next chunk with UNAVAILABLE: they can go on where they stopped."""
        self._files.close()

    async def DownloadFile(  # type: ignore[override]
        self, request: pb.DownloadFileRequest, context: "grpc.aio.ServicerContext[Any, Any]"
    ) -> None:
        """Streams a file from an offset on."""
        bundle = self._bundles.get(request.bundle)
        if bundle is None:
            raise Reason.NOT_FOUND.error(f"no bundle {request.bundle[:64]!r}; see GetCapabilities", field="bundle")
        file = next((file for file in bundle.files if file.path == request.path), None)
        if file is None:
            raise Reason.NOT_FOUND.error(
                f"bundle {bundle.name} has no file {request.path[:200]!r}; see GetCapabilities", field="path"
            )
        if not 0 <= request.offset_bytes <= file.size_bytes:
            raise Reason.FIELD_INVALID.error(
                f"offset_bytes is {request.offset_bytes}; choose 0 to {file.size_bytes}", field="offset_bytes"
            )
        sent_bytes = 0
        path = bundle.folder / file.path
        self.num_streams += 1
        try:
            while chunk := await self._files.run(_read, path, request.offset_bytes + sent_bytes):
                await write(context, pb.DownloadFileResponse(chunk=chunk))
                sent_bytes += len(chunk)
                note(bundle=bundle.name, path=file.path, sent_bytes=sent_bytes)
        finally:
            self.num_streams -= 1


def _read(path: Path, offset_bytes: int) -> bytes:
    with path.open("rb") as stream:
        stream.seek(offset_bytes)
        return stream.read(CHUNK_BYTES)
