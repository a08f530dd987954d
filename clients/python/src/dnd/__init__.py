"""Labels the neurons of vision networks in words: a client of Describe-and-Dissect.

    with dnd.Client("http://127.0.0.1:50051") as client:
        for unit in client.dissect("net.onnx", {"layer4.2": [0, 1, 2]}, "photos/"):
            print(unit.layer, unit.unit, unit.label)

`dnd.aio.Client` is the same for asyncio, and `dnd.v1` has the generated messages and stubs.
"""

from . import aio
from .client import Client
from .dissection import Dissection
from .errors import Error
from .requests import print_progress
from .v1.activation_pb2 import ProbingSource, Target
from .v1.parameters_pb2 import Parameters

__all__ = ["Client", "Dissection", "Error", "Parameters", "ProbingSource", "Target", "aio", "print_progress"]
