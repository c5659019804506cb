"""`harness bandit`, `ring`, `guidance`, `likelihood`, `modes` and `ood`: one question each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from harness.cli.options import (
    DatabaseOption,
    HomeOption,
    JsonOption,
    OptionalSpec,
    OverridesArgument,
    choose_trials,
    open_store,
    open_to_read,
)
from harness.cli.printing import console, errors, print_numbers, print_paths, print_table

MAP_SIDE = 101  # points of a side of a detector's map


def bandit(
    file: Annotated[Path, typer.Argument(help="What `harness actions` wrote for the 2-D bandit.")],
    out: Annotated[Path, typer.Option(help="Folder of report, numbers and figure.")] = Path(
        "bandit"
    ),
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Judge and draw the 2-D bandit of the Diffusion-QL paper: numbers, claims, figure."""
    from analysis import bandit as report

    built = report.build(file, seed)
    paths = report.write(built, out)
    if as_json:
        claims = [vars(claim) for claim in built.claims]
        print(json.dumps({"claims": claims, "files": [str(path) for path in paths]}))
        return
    body = [(claim.text, claim.measured, claim.verdict) for claim in built.claims]
    print_table(("claim", "measured", "verdict"), body)
    print_paths(paths)


def ring(
    file: Annotated[Path, typer.Argument(help="What `harness actions` wrote for the 2-D ring.")],
    out: Annotated[Path, typer.Option(help="Folder of report, numbers and figure.")] = Path("ring"),
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Judge and draw VDD's ring of eight modes: divergence, covered modes, figure."""
    from analysis import ring as report

    built = report.build(file, seed)
    paths = report.write(built, out)
    if as_json:
        print_numbers(built.numbers, paths)
        return
    print_table(*report.rows(built))
    print_paths(paths)


def guidance(
    files: Annotated[list[Path], typer.Argument(help="What `harness synthetic` wrote.")],
    beside: Annotated[
        list[str] | None,
        typer.Option(help="GUIDED=LEVEL: labels to compare, such as guided data and a model's."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of page, numbers and figure.")] = Path(
        "guidance"
    ),
    as_json: JsonOption = False,
) -> None:
    """Judge and draw generated data by strength of guidance: errors, likelihood."""
    from analysis import guidance as report

    levels = {}
    for pair in beside or []:
        guided, _, level = pair.partition("=")
        if not (guided and level):
            raise ValueError(f"--beside {pair!r} is not a pair; expected GUIDED=LEVEL")
        levels[guided] = level
    built = report.read(*files)
    comparisons = report.compare(built, levels)
    paths = report.write(built, out, comparisons)
    if as_json:
        found = [dict(zip(report.HEADER, row, strict=True)) for row in report.rows(comparisons)]
        print(json.dumps({"comparisons": found, "files": [str(path) for path in paths]}))
        return
    print_table(report.HEADER, report.rows(comparisons))
    print_paths(paths)


def likelihood(
    file: Annotated[Path, typer.Argument(help="What `harness actions` wrote, best --held-out.")],
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """How likely the policies in a file of actions find the data's own actions."""
    from analysis import likelihood as report

    built = report.build(file, seed)
    if as_json:
        print(json.dumps(json.loads(built.numbers.to_json(orient="records"))))
        return
    print_table(*report.rows(built))
    console.print(report.caption(built), highlight=False)


def modes(
    spec: OptionalSpec = None,
    overrides: OverridesArgument = None,
    out: Annotated[Path, typer.Option(help="Folder of page, numbers and figure.")] = Path("modes"),
    count: Annotated[
        int | None, typer.Option("--modes", help="How many solutions there are; none: all seen.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the bootstrap.")] = 0,
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Which solutions of a task the final policies use: success and task entropy, with a figure."""
    from analysis import modes as report

    _, store = open_to_read(home, db, spec)
    with store:
        built = report.build(store, choose_trials(store, spec, overrides), count, seed)
    paths = report.write(built, out)
    if as_json:
        print_numbers(built.numbers, paths)
        return
    print_table(*report.rows(built))
    for note in built.notes:
        console.print(note, highlight=False)
    print_paths(paths)


def ood(
    dataset: Annotated[str, typer.Argument(help="Minari id or D4RL name.")],
    seeds: Annotated[str, typer.Option(help="Such as 0-4.")] = "0-4",
    steps: Annotated[int, typer.Option(help="Gradient steps of each detector.", min=1)] = 20_000,
    width: Annotated[int, typer.Option(help="Of the networks' hidden layers.", min=1)] = 256,
    only: Annotated[
        list[str] | None, typer.Option("--detector", help="Only this one; may be repeated.")
    ] = None,
    actions_file: Annotated[
        Path | None,
        typer.Option("--actions", help="Also what trained policies do: of `harness actions`."),
    ] = None,
    count: Annotated[int, typer.Option(help="Actions of each kind and seed.", min=10)] = 2000,
    last_step: Annotated[
        str, typer.Option("--truncated-last-step", help="drop or keep, as an experiment's data.")
    ] = "drop",
    out: Annotated[Path, typer.Option(help="Folder of the figures.")] = Path("ood"),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    home: HomeOption = None,
    db: DatabaseOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare detectors of out-of-distribution actions: held-out data against other actions."""
    import torch

    from algorithms.detectors import DetectorConfig
    from analysis import detection
    from analysis.plots import save_figure
    from harness import datasets
    from harness import ood as benchmark
    from harness.datasets.data_spec import DataSpec
    from harness.display import counted
    from harness.spec import parse_seeds

    chosen = parse_seeds(seeds)
    chosen_data = DataSpec(truncated_last_step=last_step)
    data = datasets.load(dataset, chosen_data)
    spec = data.spec
    policies = {}
    if actions_file is not None:
        import pandas as pd

        policies = benchmark.policy_actions(pd.read_parquet(actions_file), spec.id)
    flat = spec.obs_dim == spec.action_dim == 1
    config = DetectorConfig(steps=steps, hidden_dim=width)
    with counted(errors) as tell:
        found = benchmark.compare(
            data, chosen, only or (), config, count, policies, device,
            grid=MAP_SIDE if flat else 0, report=lambda name, done, steps: tell(done, steps, name),
        )  # fmt: skip
    rows = [m for s in found for m in detection.measure(s.detector, s.data, s.against)]
    _, store = open_store(home, db)
    parent, *detections = benchmark.records(spec, chosen, found, rows, policies, chosen_data)
    with store:
        store.append([parent])
        stayed = len(detections) - store.append(detections)
    if stayed:
        errors.print(
            f"{stayed} of {len(detections)} rows were in the database, from the same data, "
            "detector, settings and seed: those stay. What is printed is of now",
            highlight=False,
        )
    held_out = len(benchmark.split(data.lengths)[1])
    source = {"dataset": spec.id, "digest": spec.digest, "seeds": list(chosen),
              "steps": steps, "width": width, "held_out": benchmark.HELD_OUT,
              "held_out_rows": held_out, "truncated_last_step": last_step,
              "policies": {name: given.digest for name, given in policies.items()},
              "perturbation": benchmark.PERTURBATION,
              "interval": "95 % bootstrap over seeds"}  # fmt: skip
    curves = detection.draw_curves({s.detector: (s.data, s.against) for s in found})
    files = save_figure(curves, out / "detectors", source)
    if flat:
        obs, action = (axis.cpu().numpy() for axis in benchmark.grid_axes(data, MAP_SIDE))
        pairs = torch.cat((data.obs, data.action), dim=1).cpu().numpy()
        maps = {s.detector: s.grid for s in found if s.grid is not None}
        files += save_figure(detection.draw_maps(maps, obs, action, pairs), out / "maps", source)
    if as_json:
        values = [
            {"detector": m.detector, "against": m.against, "auroc": m.auroc.tolist(),
             "aupr": m.aupr.tolist(), "fpr95": m.fpr95.tolist()}
            for m in rows
        ]  # fmt: skip
        print(json.dumps({"detections": values, "files": [str(path) for path in files]}))
        return
    body = [
        (m.detector, m.against, *map(detection.with_interval, (m.auroc, m.aupr, m.fpr95)))
        for m in rows
    ]
    print_table(("detector", "against", "AUROC", "AUPR", "FPR at 95 % TPR"), body)
    caption = (
        f"{spec.id}: {len(chosen)} seeds, {steps} steps, 95 % bootstrap intervals over seeds; all "
        f"seeds score {count} draws of the same {held_out} held-out rows"
    )
    console.print(caption, highlight=False)
    print_paths(files)
