"""Train on prose, then on code, with and without a replay of the prose: what is learned, and what is forgotten?

python examples/continued_pretraining.py [FOLDER]     # or: make continued; about six minutes on two cores

The same from the command line:

    llmfast train --name prose --set data.weights.prose=1 --set data.weights.code=0
    llmfast continue runs/prose --target code --general prose --name with-replay
    llmfast continue runs/prose --target code --general prose --name without --no-replay
"""

import argparse
from pathlib import Path

from llmfast.train import load_config, train
from llmfast.train.continued import continued_config
from llmfast.train.metrics import read_metrics

BEFORE = ["train.steps=500", "data.weights.prose=1", "data.weights.code=0"]  # one tokenizer for both
AFTER = ["train.steps=300", "optimizer.lr=0.001"]
OFTEN = ["train.eval_every=50", "train.eval_rows=48", "train.sample_tokens=0"]


def main(folder: Path, *more: str) -> dict[str, dict[str, float]]:
    """Train three runs, draw a picture, and return how much each validation loss rose in the last two runs."""
    if not (folder / "prose" / "loss.png").exists():
        train(load_config(None, [*BEFORE, *OFTEN, *more, f"runs={folder}", "name=prose"]), overwrite=True)
    found, curves = {}, {}
    for name, replay in (("with replay", True), ("without replay", False)):
        config = continued_config(
            folder / "prose",
            ["code"],
            general=["prose"],
            replay=replay,
            overrides=[*AFTER, *OFTEN, *more, f"name={name.replace(' ', '-')}"],
        )
        run = train(config, overwrite=True)
        curves[name] = [line for line in read_metrics(run / "metrics.jsonl") if "validation" in line]
        first, last = curves[name][0]["validation"], curves[name][-1]["validation"]
        found[name] = {source: last[source] - first[source] for source in last}
    draw(curves, folder / "continued.png")
    for name, changes in found.items():
        print(f"{name}: " + ", ".join(f"{source} {change:+.3f} nats per token" for source, change in changes.items()))
    print(f"picture: {folder / 'continued.png'}")
    return found


def draw(curves: dict[str, list[dict[str, dict[str, float]]]], picture: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, source in zip(figure.subplots(1, 2), ("prose", "code")):
        for (name, lines), style in zip(curves.items(), ("-", "--")):
            steps, losses = zip(*((line["step"], line["validation"][source]) for line in lines))
            axes.plot(steps, losses, style, marker="o", markersize=3, label=name)
        axes.set(title=f"{source}, held out", xlabel="steps on code, after those on prose", ylabel="nats per token")
        axes.grid(alpha=0.2)
        axes.legend(frameon=False)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/continued"), help="a folder for the runs")
    parser.add_argument("settings", nargs="*", help="such as train.steps=100")
    given = parser.parse_args()
    main(given.folder, *given.settings)
