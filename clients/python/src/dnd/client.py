"""A client that waits for what it asks. `aio` has the same for asyncio."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
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
    """Calls a mesh.

    Calls whose mesh is away are made again for about a minute; what fails raises `dnd.Error`. `dissect_service`, `picture_service` and `upload_service` are
    the generated stubs, for all that has no method here: give them `metadata=client.metadata`, which has the token, and read what they raise with
    `Error.of_call`.

    Args:
        endpoint: Where an orchestrator listens, such as `http://127.0.0.1:50051`, or with https.
        token: Shown with each call.
        ca: File of the authority that issued the server's certificate, if it is none of the system's.
        cert: File of this client's own certificate, with `key`, where the server asks for one.
        insecure: Lets an endpoint on another machine be spoken to in the clear.
    """

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
        self._channel = grpc.secure_channel(address, requests.tls(ca, cert, key), options) if secure else grpc.insecure_channel(address, options)
        self.metadata = requests.metadata(token)
        self.dissect_service = DissectServiceStub(self._channel)
        self.picture_service = PictureServiceStub(self._channel)
        self.upload_service = UploadServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._channel.close()

    def dissect(
        self,
        target: FileLike | Target,
        layers: Mapping[str, Iterable[int]],
        images: Images,
        *,
        parameters: Parameters | None = None,
        request_id: str = "",
        progress: Progress | None = None,
    ) -> Dissection:
        """Labels units, and comes back when all have ended.

        Args:
            target: An ONNX file that the mesh can read, by path or `file:` URI; a `Target` where more is to be said, or the file was uploaded.
            layers: The units of each layer; none means all.
            images: Folders or .tar files that the mesh can read, or what `upload_pictures` gave.
            parameters: The method's constants; unset ones have the paper's values.
            request_id: With the same one the same job is found again, by another process too.
            progress: Told how far the stages are.
        """
        return self.follow(self.create(requests.dissect_request(target, layers, images, parameters, request_id)), progress)

    def create(self, request: DissectRequest) -> Job:
        """Creates a job and comes back. The request should have a request_id, so that no second job is made if the mesh goes away in between."""
        return _retried(lambda: self.dissect_service.CreateJob(CreateJobRequest(request=request), metadata=self.metadata).job)

    def follow(self, job: Job | str, progress: Progress | None = None) -> Dissection:
        """The results of a job, or of the one of an id, when it has ended."""
        dissection = Dissection(self._job(job) if isinstance(job, str) else job)
        for event in self.watch(dissection.job_id):
            if event.HasField("progress") and progress:
                progress(event.progress)
            if dissection.take(event):
                break
        dissection.pictures = self.pictures(dissection.shown())
        return dissection

    def _job(self, job_id: str) -> Job:
        return _retried(lambda: self.dissect_service.GetJob(GetJobRequest(job_id=job_id), metadata=self.metadata).job)

    def watch(self, job_id: str, after: int = 0) -> Iterator[JobEvent]:
        """What happens in a job, after the event of a number, until it has ended. A broken connection is made again, and no numbered event is missed."""
        patience = Patience()
        while True:
            call = self.dissect_service.WatchJob(WatchJobRequest(job_id=job_id, after=after), metadata=self.metadata)
            try:
                for response in call:
                    after = max(after, response.event.number)
                    patience = Patience()
                    yield response.event
                return
            except grpc.RpcError as failure:
                time.sleep(patience.wait(Error.of_call(failure)))
            finally:
                call.cancel()

    def select(
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
        """Lets concepts of your own compete for a unit. The pictures that excite it come from a probing set, or from an earlier result of the unit."""
        request = requests.select_request(target, layer, unit, concepts, images, parameters)
        return _retried(lambda: self._select(request, progress))

    def _select(self, request: SelectConceptRequest, progress: Progress | None) -> UnitResult:
        unit = UnitResult()
        for event in self.dissect_service.SelectConcept(request, metadata=self.metadata):
            if event.HasField("progress") and progress:
                progress(event.progress)
            if event.HasField("unit"):
                unit = event.unit
        return unit

    def pictures(self, digests: Iterable[str]) -> dict[str, bytes]:
        """The pictures that results name, by digest. What is not kept any more is left out."""
        found: dict[str, bytes] = {}
        for some in requests.chunks(digests):
            found |= _retried(lambda: self._pictures(some))
        return found

    def _pictures(self, digests: list[str]) -> dict[str, bytes]:
        answers = self.picture_service.GetPictures(GetPicturesRequest(digests=digests), metadata=self.metadata)
        return {got.digest: got.picture for got in answers if got.HasField("picture")}

    def upload(self, file: FileLike) -> str:
        """Uploads a file, if it is not there yet, and gives its digest. The target's is `Target(digest=..., preprocessing=...)`."""
        digest = requests.digest_of(file)
        self._upload({digest: Path(file)})
        return digest

    def upload_pictures(self, folder: FileLike) -> ProbingSource:
        """Uploads the pictures of a folder and its subfolders that are not there yet."""
        pictures, files = requests.listed(folder)
        encoded = pictures.SerializeToString(deterministic=True)
        digest = requests.digest(encoded)
        self._upload({**files, digest: encoded})
        return ProbingSource(list_digest=digest)

    def _upload(self, blobs: Mapping[str, Path | bytes]) -> None:
        for some in requests.chunks(blobs):
            _retried(lambda: self._upload_missing(some, blobs))

    def _upload_missing(self, digests: list[str], blobs: Mapping[str, Path | bytes]) -> None:
        # What had arrived of a broken upload is not sent again.
        missing = self.upload_service.CheckUploads(CheckUploadsRequest(digests=digests), metadata=self.metadata).missing
        if missing:
            self.upload_service.Upload(requests.pieces(missing, blobs), metadata=self.metadata)


def _retried(call: Callable[[], T]) -> T:
    """Makes a call, and makes it again while the mesh is away. What is asked here may be asked twice."""
    patience = Patience()
    while True:
        try:
            return call()
        except grpc.RpcError as failure:
            time.sleep(patience.wait(Error.of_call(failure)))
