"""Makes the whole suite, from nothing or from where it stopped: `python -m train.all`."""

from __future__ import annotations

from . import captioner, clip, diffusion, evaluate, judge, planted, probing_set, resnet, summarizer


def main() -> None:
    probing_set.write()
    for model in (diffusion, captioner, clip, resnet):
        model.train()
        model.export_all()
    summarizer.train()
    summarizer.export()
    planted.export_network(planted.Planted().eval())
    judge.train()
    evaluate.main()


if __name__ == "__main__":
    main()
