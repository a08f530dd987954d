"""Both clients over a mesh that breaks: what they ask again, what they tell, and what comes of it."""

import asyncio
import io
import tempfile
import unittest
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from PIL import Image

import dnd
from dnd import requests
from dnd.v1 import dissect_pb2, dissect_pb2_grpc, job_pb2, picture_pb2, picture_pb2_grpc, result_pb2, upload_pb2, upload_pb2_grpc
from dnd.v1.activation_pb2 import LayerUnits

PICTURE = io.BytesIO()
Image.effect_noise((600, 800), 50).save(PICTURE, "PNG")


def fail(context: Any, code: grpc.StatusCode, message: str, *details: Message) -> None:
    status = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    context.set_trailing_metadata([("grpc-status-details-bin", status.SerializeToString())])
    context.abort(code, message)


def unit(number: int, label: str, **more: Any) -> result_pb2.UnitResult:
    return result_pb2.UnitResult(layer="colour", unit=number, state=result_pb2.UNIT_STATE_LABELLED, label=label, labels=[label], **more)


class Mesh(dissect_pb2_grpc.DissectServiceServicer, picture_pb2_grpc.PictureServiceServicer, upload_pb2_grpc.UploadServiceServicer):
    """Has one job of two units. It was cancelled once, and resumed. The first call finds it full, and each watcher is cut off after three events."""

    def __init__(self) -> None:
        self.request_ids: list[str] = []
        self.tokens: set[Any] = set()
        self.watched: list[int] = []
        self.selections: list[dissect_pb2.SelectConceptRequest] = []
        self.arrived = b"01"

    def CreateJob(self, request: dissect_pb2.CreateJobRequest, context: Any) -> dissect_pb2.CreateJobResponse:
        self.tokens.add(dict(context.invocation_metadata()).get("authorization"))
        self.request_ids.append(request.request.request_id)
        if request.request.layers[0].layer == "nowhere":
            field = error_details_pb2.BadRequest.FieldViolation(field="layers[0].layer")
            info = error_details_pb2.ErrorInfo(reason="UNKNOWN_LAYER", domain="dnd.v1")
            fail(context, grpc.StatusCode.INVALID_ARGUMENT, "no such layer", info, error_details_pb2.BadRequest(field_violations=[field]))
        if len(self.request_ids) == 1:
            fail(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "full", error_details_pb2.RetryInfo(retry_delay=Duration(nanos=10_000_000)))
        return dissect_pb2.CreateJobResponse(job=job_pb2.Job(job_id="job", last_event=3))

    def WatchJob(self, request: dissect_pb2.WatchJobRequest, context: Any) -> Iterator[dissect_pb2.WatchJobResponse]:
        self.watched.append(request.after)
        if request.job_id == "waiting":
            paused = job_pb2.JobPaused(reason="LLM_BUDGET", message="the budget is reached")
            yield dissect_pb2.WatchJobResponse(event=job_pb2.JobEvent(number=1, paused=paused))
            context.abort(grpc.StatusCode.INTERNAL, "nobody should wait for more")
        exciting = result_pb2.ActivatingImage(digest="b" * 64, caption="a <red> wall")
        events: list[dict[str, Any]] = [
            {"accepted": job_pb2.JobAccepted(job_id="job", layers=[LayerUnits(layer="colour", units=[3, 0])])},
            {"done": job_pb2.JobDone(cancelled=True)},
            {"unit": unit(0, "red", images=[exciting], concepts=[result_pb2.RankedConcept(concept="red", score=2.5), result_pb2.RankedConcept(concept="dark red")])},
            {"unit": unit(3, "green")},
            {"done": job_pb2.JobDone(labelled=2)},
        ]
        for number, event in list(enumerate(events, 1))[request.after :][:3]:
            yield dissect_pb2.WatchJobResponse(event=job_pb2.JobEvent(number=number, **event))
        if request.after < 3:
            yield dissect_pb2.WatchJobResponse(event=job_pb2.JobEvent(progress=job_pb2.StageProgress(stage=job_pb2.STAGE_PROBE, done=1, total=2)))
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    def GetJob(self, request: dissect_pb2.GetJobRequest, context: Any) -> dissect_pb2.GetJobResponse:
        return dissect_pb2.GetJobResponse(job=job_pb2.Job(job_id=request.job_id, last_event=1 if request.job_id == "waiting" else 3))

    def SelectConcept(self, request: dissect_pb2.SelectConceptRequest, context: Any) -> Iterator[dissect_pb2.SelectConceptResponse]:
        self.selections.append(request)
        yield dissect_pb2.SelectConceptResponse(progress=job_pb2.StageProgress(stage=job_pb2.STAGE_GENERATE, done=len(self.selections), total=2))
        if len(self.selections) == 1:
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield dissect_pb2.SelectConceptResponse(unit=unit(request.unit, request.concepts[1]))

    def GetPictures(self, request: picture_pb2.GetPicturesRequest, context: Any) -> Iterator[picture_pb2.GetPicturesResponse]:
        for digest in request.digests:
            yield picture_pb2.GetPicturesResponse(digest=digest, picture=PICTURE.getvalue())

    def CheckUploads(self, request: upload_pb2.CheckUploadsRequest, context: Any) -> upload_pb2.CheckUploadsResponse:
        missing = [upload_pb2.MissingBlob(digest=request.digests[0], received=len(self.arrived))]
        return upload_pb2.CheckUploadsResponse(missing=missing)

    def Upload(self, pieces: Iterator[upload_pb2.UploadRequest], context: Any) -> upload_pb2.UploadResponse:
        first = len(self.arrived) == 2
        for piece in pieces:
            assert piece.offset == len(self.arrived) and len(piece.data) <= requests.PIECE_BYTES
            self.arrived += piece.data
            if first:
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        return upload_pb2.UploadResponse(blobs=1)


class ClientTest(unittest.TestCase):
    def setUp(self) -> None:
        self.mesh = Mesh()  # type: ignore[abstract]  # What it has no method for is UNIMPLEMENTED.
        server = grpc.server(futures.ThreadPoolExecutor(4))
        dissect_pb2_grpc.add_DissectServiceServicer_to_server(self.mesh, server)
        picture_pb2_grpc.add_PictureServiceServicer_to_server(self.mesh, server)
        upload_pb2_grpc.add_UploadServiceServicer_to_server(self.mesh, server)
        self.endpoint = f"http://127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
        server.start()
        self.addCleanup(server.stop, None)

    def check(self, result: dnd.Dissection, seen: list[job_pb2.StageProgress]) -> None:
        self.assertEqual([(unit.unit, unit.label) for unit in result], [(3, "green"), (0, "red")], "in the order that was asked for")
        self.assertEqual(self.mesh.watched, [0, 3], "the watch goes on after the last event")
        self.assertEqual(len(seen), 1)
        self.assertEqual(len(self.mesh.request_ids), 2)
        self.assertTrue(self.mesh.request_ids[0])
        self.assertEqual(len(set(self.mesh.request_ids)), 1, "one job, however often it is asked for")
        self.assertEqual(self.mesh.tokens, {"Bearer secret"})

    def test_a_job_is_followed_through_a_full_mesh_and_a_broken_stream(self) -> None:
        seen: list[job_pb2.StageProgress] = []
        with dnd.Client(self.endpoint, token="secret") as client:
            self.check(client.dissect("net.onnx", {"colour": [3, 0]}, "photos", progress=seen.append), seen)

    def test_so_it_is_with_asyncio(self) -> None:
        seen: list[job_pb2.StageProgress] = []

        async def dissect() -> dnd.Dissection:
            async with dnd.aio.Client(self.endpoint, token="secret") as client:
                return await client.dissect("net.onnx", {"colour": [3, 0]}, "photos", progress=seen.append)

        self.check(asyncio.run(dissect()), seen)

    def test_an_error_says_why_and_where_and_is_not_tried_again(self) -> None:
        async def dissect() -> None:
            async with dnd.aio.Client(self.endpoint) as client:
                await client.dissect("net.onnx", {"nowhere": []}, "photos")

        with dnd.Client(self.endpoint) as client:
            for ask in (lambda: client.dissect("net.onnx", {"nowhere": []}, "photos"), lambda: asyncio.run(dissect())):
                with self.assertRaises(dnd.Error) as raised:
                    ask()
                error = raised.exception
                self.assertEqual((error.code, error.reason, error.field), (grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_LAYER", "layers[0].layer"))
                self.assertEqual(str(error), "UNKNOWN_LAYER: no such layer (field layers[0].layer)")
        self.assertEqual(len(self.mesh.request_ids), 2)

    def test_a_broken_upload_goes_on_where_it_stopped(self) -> None:
        async def upload(file: Path) -> str:
            async with dnd.aio.Client(self.endpoint) as client:
                return await client.upload(file)

        with tempfile.TemporaryDirectory() as folder, dnd.Client(self.endpoint) as client:
            file = Path(folder, "net.onnx")
            file.write_bytes(b"0123456789" * 150_000)
            for ask in (client.upload, lambda file: asyncio.run(upload(file))):
                self.mesh.arrived = b"01"
                self.assertEqual(ask(file), requests.digest(file.read_bytes()))
                self.assertEqual(self.mesh.arrived, file.read_bytes())

    def test_concepts_compete_over_the_pictures_of_a_result_also_when_the_mesh_goes_away(self) -> None:
        earlier = unit(7, "red", images=[result_pb2.ActivatingImage(digest="b" * 64)])
        seen: list[job_pb2.StageProgress] = []

        async def select() -> result_pb2.UnitResult:
            async with dnd.aio.Client(self.endpoint) as client:
                return await client.select("net.onnx", "colour", 7, ["sea", "sky"], "photos", progress=seen.append)

        with dnd.Client(self.endpoint) as client:
            self.assertEqual(client.select("net.onnx", "colour", 7, ["sea", "sky"], earlier, progress=seen.append).label, "sky")
        self.assertEqual([progress.done for progress in seen], [1, 2])
        self.assertEqual(self.mesh.selections[1].stored.images, earlier.images)
        self.mesh.selections.clear()
        self.assertEqual(asyncio.run(select()).label, "sky")
        self.assertEqual([progress.done for progress in seen], [1, 2, 1, 2])
        self.assertTrue(self.mesh.selections[1].probing_set.sources[0].uri.startswith("file:///"))

    def test_a_job_is_found_again_by_its_id_and_one_that_waits_for_someone_says_so(self) -> None:
        async def follow(job_id: str) -> dnd.Dissection:
            async with dnd.aio.Client(self.endpoint) as client:
                return await client.follow(job_id)

        with dnd.Client(self.endpoint) as client:
            for ask in (client.follow, lambda job_id: asyncio.run(follow(job_id))):
                self.assertEqual(ask("job")["colour", 3].label, "green")
                with self.assertRaises(dnd.Error) as raised:
                    ask("waiting")
                self.assertEqual((raised.exception.reason, raised.exception.message), ("LLM_BUDGET", "the budget is reached"))

    def test_a_result_is_a_table_and_is_seen_in_a_notebook(self) -> None:
        with dnd.Client(self.endpoint) as client:
            result = client.dissect("net.onnx", {"colour": [3, 0]}, "photos")
        table = result.to_dataframe()
        self.assertEqual(table.label.tolist(), ["green", "red"])
        self.assertEqual((table.score[1], table.second[1]), (2.5, "dark red"))
        html = result._repr_html_()
        self.assertIn("2 labelled, 0 dead, 0 failed", html)
        self.assertIn("data:image/png;base64,iVBOR", html)
        self.assertLess(len(html), 50_000, "a large picture is shown as a small one")
        self.assertIn('title="a &lt;red&gt; wall"', html)

    def test_a_folder_is_listed_by_the_bytes_of_its_paths(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("b.PNG", "a/é.jpg", "a/z.jpg", "B.png", ".hidden.png", "notes.txt"):
                path = Path(folder, name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(name.encode())
            pictures, files = requests.listed(folder)
        self.assertEqual([picture.path for picture in pictures.pictures], ["B.png", "a/z.jpg", "a/é.jpg", "b.PNG"])
        self.assertEqual(len(files), 4)

    def test_nothing_goes_in_the_clear_to_another_machine_unless_that_is_said(self) -> None:
        with self.assertRaisesRegex(ValueError, "in the clear"):
            dnd.Client("http://mesh.example:50051", token="secret")
        dnd.Client("http://mesh.example:50051", insecure=True).close()
        with self.assertRaisesRegex(ValueError, "no endpoint"):
            dnd.Client("127.0.0.1:50051")


if __name__ == "__main__":
    unittest.main()
