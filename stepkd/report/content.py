"""What a page says of its folders: figures, and numbers that compare folders; the template holds the words."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, combinations, groupby, zip_longest
from typing import Any

from stepkd.errors import StepkdError
from stepkd.report.folders import (
    CLAIM,
    EVALUATION,
    ITERATED,
    JUDGEMENT,
    LABELS,
    SCORES,
    SEARCH,
    TRAINING,
    Folder,
    best_of_n,
)
from stepkd.report.plots import Figure, Series, bars, dots, plot, scatter, thinned
from stepkd.statistics import shown

LENGTH_BINS = 16
METHODS = {"pass": "some sample correct (ceiling)", "majority": "majority vote"}
"""Methods of best-of-N that are no scorers."""
MOST_COMPARED = 8
"""With more evaluations of one benchmark, each is compared with the first one of its sampling only."""
ENDS = ("value", "low", "high")
MOST_BANDS = 4
"""With more curves in a plot of best-of-N their intervals stand in the table alone."""
RESAMPLES = 2_000
"""Resamples of differences of step metrics: fewer than elsewhere, since there are many pairs."""
DRAWN = {
    "greedy_pass@1": "correct, greedy",
    "pass@1": "correct (pass@1)",
    "step_accuracy": "correct steps",
    "correct_with_incorrect_step": "correct answers with an incorrect step",
}
"""Metrics of a model that have a plot."""
NOT_DRAWN = ("perf/", "epoch", "run", "step", "seconds", "train/tokens")
"""What is logged and has no plot."""
FIRST_DRAWN = ("loss", "reward", "accuracy", "correct")
"""What is in the names of the curves that come first."""


def content(folders: Sequence[Folder]) -> dict[str, Any]:
    """Everything that the template shows beside the folders themselves."""
    of: dict[str, list[Folder]] = defaultdict(list)
    for folder in folders:
        of[folder.kind].append(folder)
    sets = {folder.name: _sets(folder) for folder in (*of[JUDGEMENT], *of[SCORES])}
    return {
        "of": of,
        "differing": {kind: _differing(same) for kind, same in of.items() if 1 < len(same) <= MOST_COMPARED},
        "engines": list(_engines([*of[EVALUATION], *of[SEARCH], *of[LABELS]])),
        "benchmarks": list(_benchmarks(of[EVALUATION])),
        "searches": [_search(folder) for folder in of[SEARCH] if folder.summary],
        "best_of_n": [_curves_by_n(name, result) for name, result in best_of_n(folders)],
        "sets": sets,
        "f1_differences": list(_f1_differences(of[JUDGEMENT])),
        "plots": {
            "claims": [figure for folder in of[CLAIM] for figure in _claim_plots(folder)],
            "iterations": [_iteration_plot(folder) for folder in of[ITERATED] if folder.summary],
            "scores": [figure for name, found in sets.items() for figure in _score_plots(name, found)],
            "labels": [_label_plot(folder) for folder in of[LABELS] if folder.summary],
            "curves": list(_curves(of[TRAINING])),
            "lengths": [_length_plot(folder) for folder in folders if folder.solutions],
        },
    }


def _differing(same: Sequence[Folder]) -> dict[str, list[Any]]:
    """Settings in which folders of one kind differ -> the value of each."""
    names = dict.fromkeys(name for folder in same for name in folder.settings)
    values = {name: [folder.settings.get(name, "–") for folder in same] for name in names}
    return {name: each for name, each in values.items() if any(value != each[0] for value in each)}


def _engines(folders: Sequence[Folder]) -> Iterator[dict[str, Any]]:
    """What sampled for evaluations, searches and labels: engine, build, dtype, tokens (of labels at the end)."""
    for folder in folders:
        of = folder.settings.get
        if (engine := of("engine.name")) is not None:
            build = f"vLLM {of('engine.vllm')}" if of("engine.vllm") else f"transformers {of('versions.transformers')}"
            dtype = str(of("engine.dtype") or of("dtype") or of("model.dtype")).removeprefix("torch.")
            dtype = "–" if dtype == "None" else dtype  # a server that does not say
            drawn = sum(each.tokens or 0 for each in folder.solutions)
            if folder.kind == LABELS:  # its rows are those that were labelled, without what was drawn for it
                parts = {"sampling": "tokens_generated", "labelling": "generated_tokens"}
                drawn = sum(folder.summary.get(part, {}).get(name, 0) for part, name in parts.items())
            if folder.kind == SEARCH:  # what chooses among the shared samples draws nothing
                chooses = {name for name in folder.settings if str(folder.settings[name]).endswith(".BestOfN")}
                rows = [row for row in folder.rows if f"methods.{row['method']}.class_path" not in chooses]
                drawn = sum(row["tokens"]["generated"] for row in rows)
            yield {"name": folder.name, "engine": engine, "build": build, "dtype": dtype, "tokens": drawn}


# ---- models on benchmarks --------------------------------------------------------------------------------------------


def _benchmarks(evaluations: Sequence[Folder]) -> Iterator[dict[str, Any]]:
    """Evaluations by benchmark and data: metrics (of the problems that are done), plots and paired differences."""
    from stepkd.evaluation.metrics import summarise

    def data(folder: Folder) -> tuple[str, ...]:
        return tuple(str(folder.settings.get(f"benchmark.{name}", "")) for name in ("name", "options.task", "data"))

    for (*name, _), group in groupby(sorted((each for each in evaluations if each.rows), key=data), data):
        same = list(group)
        names = _short([each.name for each in same])
        models = {names[each.name]: (each.summary or summarise(each.rows))["metrics"] for each in same}
        figures = []
        for metric, title in DRAWN.items():
            rows = {model: [each[metric][end] for end in ENDS] for model, each in models.items() if metric in each}
            is_defined = any(value is not None for value, *_ in rows.values())
            figures += [dots(title, rows, "percent", 100.0)] if is_defined else []
        pairs = [{**each, "a": names[a.name], "b": names[b.name]} for a, b, each in _pairs(same)]
        yield {"name": " ".join(filter(None, name)), "models": models, "figures": figures, "pairs": pairs}


def _short(names: Sequence[str]) -> dict[str, str]:
    """Names of folders without the parts that all of them begin or end with."""
    parts = [name.split("/") for name in names]
    for end in (0, -1):
        while min(map(len, parts)) > 1 and len({each[end] for each in parts}) == 1:
            parts = [each[1:] if end == 0 else each[:-1] for each in parts]
    return {name: "/".join(each) for name, each in zip(names, parts, strict=True)}


def _pairs(same: Sequence[Folder]) -> Iterator[tuple[Folder, Folder, dict[str, Any]]]:
    """Paired differences between evaluations with the same sampling; between all where no two have the same."""
    from stepkd.evaluation.metrics import compare_runs, paired_differences

    def sampling(folder: Folder) -> list[Any]:
        return [folder.settings.get(f"sampling.{name}") for name in ("n", "temperature")]

    pairs, firsts = list(combinations(same, 2)), dict[str, Folder]()
    alike = [pair for pair in pairs if sampling(pair[0]) == sampling(pair[1])]
    for a, b in alike or pairs:
        first = firsts.setdefault(str(sampling(a)) if alike else "", a)
        if len(same) > MOST_COMPARED and a is not first:
            continue
        try:
            found = compare_runs(a.path, b.path)
        except StepkdError:  # no problem in common
            continue
        common = {str(row["id"]) for row in a.rows} & {str(row["id"]) for row in b.rows}
        rows = ([row for row in each.rows if str(row["id"]) in common] for each in (b, a))
        yield (
            a,
            b,
            {**paired_differences(*rows, n_resamples=RESAMPLES), "test": found, "pass@1": found.difference.to_dict()},
        )


def _percent(name: str, x: Sequence[float], metrics: Sequence[Mapping[str, Any]], style: int) -> Series:
    y, low, high = ([_scaled(at[end]) for at in metrics] for end in ENDS)
    return Series(name, x, y, low, high, style)


def _iteration_plot(folder: Folder) -> Figure:
    models, series = [model["metrics"] for model in folder.summary["models"]], list[Series]()
    for metric, title in DRAWN.items():
        if all(each.get(metric) for each in models):
            series.append(_percent(title, range(len(models)), [each[metric] for each in models], len(series)))
    return plot(folder.name, series, "iteration", "percent", ticks={k: f"M{k}" for k in range(len(models))})


def _claim_plots(folder: Folder) -> Iterator[Figure]:
    for name, claim in folder.summary.items():
        for variant, arms in claim["metrics"].items():
            for metric in dict.fromkeys(statement["metric"] for statement in claim["statements"]):
                found = {arm: each[metric] for arm, each in arms.items() if metric in each}
                rows = {arm: [*(each[end] for end in ENDS), *each["per_seed"]] for arm, each in found.items()}
                where = name if len(claim["metrics"]) == 1 else f"{name}, {variant}"
                yield dots(f"{where}: {metric}", rows, "mean, 95% interval; rings are seeds")


# ---- scorers ---------------------------------------------------------------------------------------------------------


def _curves_by_n(name: str, result: Mapping[str, Any]) -> dict[str, Any]:
    from stepkd.evaluation.best_of_n import outvoted

    ks = result["ks"]
    names = {each: METHODS.get(each, each.replace("_vote", ", weighted vote")) for each in result["curves"]}
    curves = {names[each]: curve for each, curve in result["curves"].items()}
    series = [_percent(each, range(len(ks)), curve, i) for i, (each, curve) in enumerate(curves.items())]
    if len(series) > MOST_BANDS:
        series = [replace(each, low=(), high=()) for each in series]
    figure = plot(name, series, "samples N", "correct, percent", ticks={i: str(k) for i, k in enumerate(ks)})
    peaks = {names[each]: found for each, found in result.get("peaks", {}).items()}  # older results have none
    of_problems = {"name": name, "problems": result["problems"], "notes": outvoted(result)}
    return of_problems | {"ks": ks, "curves": curves, "peaks": peaks, "figure": figure}


def _sets(folder: Folder) -> dict[str, Any]:
    """Metrics of a scorer by set: those that a judgement stored, or those that labels and scores of rows give."""
    from stepkd.evaluation.diagnostics import argmin_positions
    from stepkd.evaluation.process import summarise_process
    from stepkd.steps.labels import first_incorrect

    if folder.kind == JUDGEMENT:
        return dict(folder.summary.get("sets", {}))
    whole = [each for each in folder.solutions if each.scores and None not in each.scores]
    labelled = [each for each in whole if any(mark is not None for mark in each.labels)]
    rows = [{"set": "", **vars(each), "first_error": first_incorrect(each.labels)} for each in labelled]
    if rows:
        return dict(summarise_process(rows)["sets"])
    several = [each for each in whole if len(each.scores) > 1]
    scores: list[Any] = [each.scores for each in several]
    return {"": {"argmin": argmin_positions(scores, problems=[each.problem for each in several])}} if scores else {}


def _f1_differences(judged: Sequence[Folder]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """What is compared, and its interval."""
    from stepkd.evaluation.process import compare_process

    for a, b in combinations([folder for folder in judged if folder.summary], 2):
        if a.summary.get("sets", {}).keys() & b.summary.get("sets", {}).keys():
            try:
                for name, found in compare_process(a.path, b.path, (a.summary, b.summary)).items():
                    yield f"{b.name} minus {a.name}: {name}", found.to_dict()
            except StepkdError as error:
                yield f"{b.name} minus {a.name}: {error}", {}


def _score_plots(folder: str, sets: Mapping[str, Any]) -> Iterator[Figure]:
    """Of every set reliability, where the lowest score and first errors fall, and the score by the step's number."""
    for each, found in sets.items():
        name = ", ".join(filter(None, (folder, each)))
        if calibration := found.get("calibration"):
            every, most = calibration["bins"], max(each["count"] for each in calibration["bins"])
            edges, heights = [*(each["low"] for each in every), 1.0], [each["count"] / most / 4 for each in every]
            x, y = ([each[key] for each in every if each["count"]] for key in ("confidence", "accuracy"))
            parts = [replace(each, fill="behind") for each in bars(edges, {"number of steps": heights})]
            parts += [Series("calibrated", [0, 1], [0, 1], style=-1), Series("scores", x, y)]
            words = f"{calibration['n']:,} steps; expected calibration error {shown(calibration['ece'])}"
            yield plot(f"{name}: reliability", parts, "score", "share of correct steps", note=words)
        if argmin := found.get("argmin"):
            parts = bars(argmin["edges"], {"observed": argmin["observed"]})
            chance = bars(argmin["edges"], {"a random place": argmin["expected"]})[0]
            parts.append(Series(chance.name, chance.x, chance.high, style=-1))
            words = f"Last step: {shown(argmin['share_last'])}; at random {argmin['expected_last']:.3f}"
            yield plot(f"{name}: lowest score", parts, "relative place in the solution", "solutions", note=words)
        if bias := found.get("bias"):
            at = [each for each in bias["places"] if each["steps"] + each["true"] + each["predicted"]]
            numbers, across = [each["step"] for each in at], "number of the step"
            keys = ("true", "predicted")
            lines = [Series(key, numbers, [each[key] for each in at], style=i) for i, key in enumerate(keys)]
            words = f"Predicted {shown(bias['lateness'], '.2f')} steps late; at {len(bias['places'])} all from there on"
            yield plot(f"{name}: first incorrect step", lines, across, "solutions", note=words)
            y, low, high = ([(each["score"] or {}).get(end) for each in at] for end in ENDS)
            words = f"Rank correlation with the number {shown(bias['position'])}, the length {shown(bias['length'])}"
            yield plot(f"{name}: correct steps", [Series("", numbers, y, low, high)], across, "mean score", note=words)


# ---- search ----------------------------------------------------------------------------------------------------------


def _search(folder: Folder) -> dict[str, Any]:
    """Methods of a search at their cost, choosing among its samples, and accuracy by difficulty."""
    summary = folder.summary
    pool, methods = summary["pool"], summary["methods"]
    points = {
        name: [each["generated_tokens"]["value"], *(_scaled(each["accuracy"][end]) for end in ENDS)]
        for name, each in methods.items()
    }
    names = dict(METHODS)
    names |= {pool["reduction"]: "best of N", f"{pool['reduction']}_vote": "weighted vote"} if pool["reduction"] else {}
    spent = [k * pool["generated_tokens"]["value"] for k in pool["ks"]]
    lines = [
        Series(title, spent, [_scaled(at["value"]) for at in pool["curves"][name]], style=-number)
        for number, (name, title) in enumerate(names.items(), 1)
    ]
    title = f"{folder.name}: {summary['problems']} problems"
    bins = {name: count for name, count in (summary["difficulty"] or {"bins": {}})["bins"].items() if count}
    return {
        "name": folder.name,
        "summary": summary,
        "figure": scatter(title, points, lines, "tokens drawn per problem", "correct, percent"),
        "curves": _curves_by_n(f"{folder.name}: choice among N samples", {**pool, "problems": summary["problems"]}),
        "bins": bins,
    }


def _scaled(share: float | None) -> float | None:
    return None if share is None else 100 * share


# ---- labels, curves, lengths -----------------------------------------------------------------------------------------


def _label_plot(folder: Folder) -> Figure:
    summary, names = folder.summary, ("correct", "incorrect", "unlabelled")
    places = [at for at in summary["by_position"] if 100 * sum(at[name] for name in names) >= summary["labelled"]]
    stack = {name: [each[name] for each in places] for name in names}
    # Folders of before it had one name call it otherwise.
    mistaken = summary.get("correct_with_incorrect_step", summary.get("correct_answers_with_an_incorrect_step"))
    words = f"{summary['correct_answers']:,} correct answers"
    words += f", {mistaken:,} of them with an incorrect step" * (mistaken is not None)
    words += "; without places that fewer than 1% reach" * (len(places) < len(summary["by_position"]))
    parts, ticks = bars(range(len(places) + 1), stack), {at + 0.5: str(at + 1) for at in range(len(places))}
    return plot(f"{folder.name}: {summary['labelled']:,} solutions", parts, "step", "steps", ticks=ticks, note=words)


def _curves(trainings: Sequence[Folder]) -> Iterator[Figure]:
    """What trainings logged; those of one method share their plots, and the methods take turns."""
    plots = []
    for method in dict.fromkeys(folder.settings.get("model.class_path") for folder in trainings):
        same = [folder for folder in trainings if folder.settings.get("model.class_path") == method]
        found: dict[str, list[Series]] = defaultdict(list)
        for folder in same:
            for name, points in _logged(folder).items():
                split, _, metric = name.partition("/") if "/" in name else ("", "", name)
                x, y = (thinned(values) for values in zip(*points, strict=True))
                label = ", ".join(filter(None, (folder.name * (len(same) > 1), split))) or name
                style = len(found[metric])
                found[metric].append(Series(label, x, y, style=style))
        where = ", ".join(folder.name for folder in same[:2]) + ", …" * (len(same) > 2)
        first = [name for stem in FIRST_DRAWN for name in found if stem in name]
        names, steps = dict.fromkeys([*first, *found]), "optimiser step"
        plots.append([plot(f"{where}: {name}", found[name], steps, name.replace("_", " ")) for name in names])
    return (figure for figure in chain(*zip_longest(*plots)) if figure is not None)


def _logged(folder: Folder) -> dict[str, list[tuple[int, float]]]:
    """Metric -> steps with values, of those that change."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in folder.metrics:
        for name, value in row.items():
            if isinstance(value, int | float) and value - value == 0 and not name.startswith(NOT_DRAWN):
                found[name].append((row["step"], value))
    return {name: points for name, points in found.items() if len({value for _, value in points}) > 1}


def _length_plot(folder: Folder) -> Figure:
    width, stack = 1 + max(each.length for each in folder.solutions) // LENGTH_BINS, {}
    for name, correct in {"correct": True, "incorrect": False, "not graded": None}.items():
        places = Counter(each.length // width for each in folder.solutions if each.correct is correct)
        stack[name] = [places[i] for i in range(LENGTH_BINS)]
    unit = "characters" if folder.solutions[0].tokens is None else "tokens"
    words = f"{len(folder.solutions):,} solutions, {sum(each.cut_off for each in folder.solutions):,} cut off"
    return plot(folder.name, bars([i * width for i in range(LENGTH_BINS + 1)], stack), unit, "solutions", note=words)
