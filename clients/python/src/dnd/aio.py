"""The client for asyncio: `dnd.Client`, awaited."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import grpc

from . import requests
from .dissection import Dissection
from .errors import Error, Patience
from .requests import FileLike, Images, Progress
from .v1.activation_pb2 import ProbingSource, Target
from .v1.dissect_pb2 import CreateJobRequest, GetJobRequest, SelectConceptRequest, WatchJobRequest
from .v1.dissect_pb2_grpc import DissectServiceStub
from .v1.job_pb2 import Job, JobEvent
from .v1.parameters_pb2 import Parameters
from .v1.picture_pb2 import GetPicturesRequest
from .v1.picture_pb2_grpc import PictureServiceStub
from .v1.request_pb2 import DissectRequest
from .v1.result_pb2 import UnitResult
from .v1.upload_pb2 import CheckUploadsRequest
from .v1.upload_pb2_grpc import UploadServiceStub

T = TypeVar("T")


class Client:
    """Calls a mesh: arguments, methods and errors are those of `dnd.Client`. It is made where the event loop runs."""

    def __init__(
        self,
        endpoint: str,
        *,
        token: str | None = None,
        ca: FileLike | None = None,
        cert: FileLike | None = None,
        key: FileLike | None = None,
        insecure: bool = False,
    ) -> None:
        address, secure = requests.address(endpoint, insecure)
        options = requests.OPTIONS
        self._channel = grpc.aio.secure_channel(address, requests.tls(ca, cert, key), options) if secure else grpc.aio.insecure_channel(address, options)
        self.metadata = requests.metadata(token)
        self.dissect_service = DissectServiceStub(self._channel)
        self.picture_service = PictureServiceStub(self._channel)
        self.upload_service = UploadServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def close(self) -> None:
        await self._channel.close()

    async def dissect(
        self,
        target: FileLike | Target,
        layers: Mapping[str, Iterable[int]],
        images: Images,
        *,
        parameters: Parameters | None = None,
        request_id: str = "",
        progress: Progress | None = None,
    ) -> Dissection:
        return await self.follow(await self.create(requests.dissect_request(target, layers, images, parameters, request_id)), progress)

    async def create(self, request: DissectRequest) -> Job:
        async def create() -> Job:
            return (await self.dissect_service.CreateJob(CreateJobRequest(request=request), metadata=self.metadata)).job

        return await _retried(create)

    async def follow(self, job: Job | str, progress: Progress | None = None) -> Dissection:
        dissection = Dissection(await self._job(job) if isinstance(job, str) else job)
        async for event in self.watch(dissection.job_id):
            if event.HasField("progress") and progress:
                progress(event.progress)
            if dissection.take(event):
                break
        dissection.pictures = await self.pictures(dissection.shown())
        return dissection

    async def _job(self, job_id: str) -> Job:
        async def get() -> Job:
            return (await self.dissect_service.GetJob(GetJobRequest(job_id=job_id), metadata=self.metadata)).job

        return await _retried(get)

    async def watch(self, job_id: str, after: int = 0) -> AsyncIterator[JobEvent]:
        patience = Patience()
        while True:
            call = self.dissect_service.WatchJob(WatchJobRequest(job_id=job_id, after=after), metadata=self.metadata)
            try:
                async for response in call:
                    after = max(after, response.event.number)
                    patience = Patience()
                    yield response.event
                return
            except grpc.RpcError as failure:
                await asyncio.sleep(patience.wait(Error.of_call(failure)))
            finally:
                call.cancel()

    async def select(
        self,
        target: FileLike | Target,
        layer: str,
        unit: int,
        concepts: Iterable[str],
        images: Images | UnitResult,
        *,
        parameters: Parameters | None = None,
        progress: Progress | None = None,
    ) -> UnitResult:
        request = requests.select_request(target, layer, unit, concepts, images, parameters)
        return await _retried(lambda: self._select(request, progress))

    async def _select(self, request: SelectConceptRequest, progress: Progress | None) -> UnitResult:
        unit = UnitResult()
        async for event in self.dissect_service.SelectConcept(request, metadata=self.metadata):
            if event.HasField("progress") and progress:
                progress(event.progress)
            if event.HasField("unit"):
                unit = event.unit
        return unit

    async def pictures(self, digests: Iterable[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        for some in requests.chunks(digests):
            found |= await _retried(lambda: self._pictures(some))
        return found

    async def _pictures(self, digests: list[str]) -> dict[str, bytes]:
        answers = self.picture_service.GetPictures(GetPicturesRequest(digests=digests), metadata=self.metadata)
        return {got.digest: got.picture async for got in answers if got.HasField("picture")}

    async def upload(self, file: FileLike) -> str:
        digest = await asyncio.to_thread(requests.digest_of, file)
        await self._upload({digest: Path(file)})
        return digest

    async def upload_pictures(self, folder: FileLike) -> ProbingSource:
        pictures, files = await asyncio.to_thread(requests.listed, folder)
        encoded = pictures.SerializeToString(deterministic=True)
        digest = requests.digest(encoded)
        await self._upload({**files, digest: encoded})
        return ProbingSource(list_digest=digest)

    async def _upload(self, blobs: Mapping[str, Path | bytes]) -> None:
        for some in requests.chunks(blobs):
            await _retried(lambda: self._upload_missing(some, blobs))

    async def _upload_missing(self, digests: list[str], blobs: Mapping[str, Path | bytes]) -> None:
        missing = (await self.upload_service.CheckUploads(CheckUploadsRequest(digests=digests), metadata=self.metadata)).missing
        if missing:
            await self.upload_service.Upload(requests.pieces(missing, blobs), metadata=self.metadata)


async def _retried(call: Callable[[], Awaitable[T]]) -> T:
    patience = Patience()
    while True:
        try:
            return await call()
        except grpc.RpcError as failure:
            await asyncio.sleep(patience.wait(Error.of_call(failure)))
