"""What is asked of a mesh: the same for both clients, with nothing sent yet."""

import hashlib
import io
import os
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from urllib.parse import urlsplit

import grpc

from .v1.activation_pb2 import LayerUnits, ProbingSet, ProbingSource, Target
from .v1.dissect_pb2 import SelectConceptRequest, StoredImages
from .v1.job_pb2 import Stage, StageProgress
from .v1.parameters_pb2 import Parameters
from .v1.request_pb2 import DissectRequest
from .v1.result_pb2 import UnitResult
from .v1.upload_pb2 import ListedPicture, MissingBlob, PictureList, UploadRequest

FileLike = str | os.PathLike[str]
"""A file or folder that the mesh can read, by its path or `file:` URI."""
Images = FileLike | ProbingSource | Iterable[FileLike | ProbingSource]
Progress = Callable[[StageProgress], object]

OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]
PIECE_BYTES = 1 << 20
MAX_DIGESTS = 10_000
ENDINGS = {".bmp", ".gif", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def address(endpoint: str, insecure: bool) -> tuple[str, bool]:
    """The address of an endpoint, and whether TLS is spoken there. Beyond this machine nothing goes in the clear unless that is said."""
    url = urlsplit(endpoint)
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ValueError(f"{endpoint!r} is no endpoint: write it as http://127.0.0.1:50051, or with https")
    host = url.hostname or ""
    if url.scheme == "http" and not insecure and not (host in ("localhost", "::1") or host.startswith("127.")):
        raise ValueError(f"{endpoint} would be spoken to in the clear: use https, or say insecure=True")
    return url.netloc, url.scheme == "https"


def tls(ca: FileLike | None, cert: FileLike | None, key: FileLike | None) -> grpc.ChannelCredentials:
    ca_bytes, cert_bytes, key_bytes = (Path(file).read_bytes() if file else None for file in (ca, cert, key))
    return grpc.ssl_channel_credentials(ca_bytes, key_bytes, cert_bytes)


def metadata(token: str | None) -> tuple[tuple[str, str | bytes], ...]:
    return (("authorization", f"Bearer {token}"),) if token else ()


def uri(file: FileLike) -> str:
    path = os.fspath(file)
    return path if path.startswith("file:") else Path(path).absolute().as_uri()


def target_of(target: FileLike | Target) -> Target:
    return target if isinstance(target, Target) else Target(uri=uri(target))


def probing_set(images: Images) -> ProbingSet:
    sources = [images] if isinstance(images, str | os.PathLike | ProbingSource) else images
    return ProbingSet(sources=[source if isinstance(source, ProbingSource) else ProbingSource(uri=uri(source)) for source in sources])


def dissect_request(
    target: FileLike | Target, layers: Mapping[str, Iterable[int]], images: Images, parameters: Parameters | None, request_id: str
) -> DissectRequest:
    return DissectRequest(
        # An id of its own lets a call that was broken off be made again without a second job.
        request_id=request_id or str(uuid.uuid4()),
        target=target_of(target),
        layers=[LayerUnits(layer=layer, units=units) for layer, units in layers.items()],
        probing_set=probing_set(images),
        parameters=parameters,
    )


def select_request(
    target: FileLike | Target, layer: str, unit: int, concepts: Iterable[str], images: Images | UnitResult, parameters: Parameters | None
) -> SelectConceptRequest:
    request = SelectConceptRequest(target=target_of(target), layer=layer, unit=unit, concepts=concepts, parameters=parameters)
    if isinstance(images, UnitResult):
        request.stored.CopyFrom(StoredImages(images=images.images))
    else:
        request.probing_set.CopyFrom(probing_set(images))
    return request


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest_of(file: FileLike) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def listed(folder: FileLike) -> tuple[PictureList, dict[str, Path]]:
    """The pictures of a folder and its subfolders, in the order that the mesh wants, and where each digest lies."""
    root = Path(folder)
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*") if path.suffix.lower() in ENDINGS and not path.name.startswith(".")}
    if not files:
        raise ValueError(f"{root}: no pictures in this folder")
    pictures = [ListedPicture(path=name, digest=digest_of(files[name])) for name in sorted(files, key=str.encode)]
    return PictureList(pictures=pictures), {picture.digest: files[picture.path] for picture in pictures}


def pieces(missing: Iterable[MissingBlob], blobs: Mapping[str, Path | bytes]) -> Iterator[UploadRequest]:
    """What of the blobs is not there yet, piece by piece."""
    for blob in missing:
        source = blobs[blob.digest]
        with io.BytesIO(source) if isinstance(source, bytes) else source.open("rb") as content:
            size = content.seek(0, io.SEEK_END)
            for offset in range(content.seek(blob.received), size, PIECE_BYTES):
                yield UploadRequest(digest=blob.digest, size=size, offset=offset, data=content.read(PIECE_BYTES))


def chunks(digests: Iterable[str]) -> Iterator[list[str]]:
    """Different digests, as many as one call takes."""
    every = list(dict.fromkeys(digests))
    return (every[at : at + MAX_DIGESTS] for at in range(0, len(every), MAX_DIGESTS))


def print_progress(progress: StageProgress) -> None:
    """Says on standard error how far a stage is."""
    name = Stage.Name(progress.stage).removeprefix("STAGE_").lower()
    print(f"{name:<9} {progress.done}/{progress.total}", end="\n" if progress.done == progress.total else "\r", file=sys.stderr)
