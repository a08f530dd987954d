"""Labels units of a network: `dissect.py ENDPOINT TARGET PICTURES LAYER:UNIT...`, the target and the folder of pictures by paths that the mesh can read."""

import sys

import dnd


def main(endpoint: str, target: str, pictures: str, *asked: str) -> None:
    layers: dict[str, list[int]] = {}
    for layer, number in (at.split(":") for at in asked):
        layers.setdefault(layer, []).append(int(number))
    with dnd.Client(endpoint) as client:
        result = client.dissect(target, layers, pictures, progress=dnd.print_progress)
    for unit in result:
        print(f"{unit.layer}\t{unit.unit}\t{unit.label}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except dnd.Error as error:
        sys.exit(f"error: {error}")
