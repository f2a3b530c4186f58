"""
Tables and pictures of the runs of one or several protocols, from the rows that ``run.py`` left.

    python benchmarks/report.py benchmarks/short.yml
    python benchmarks/report.py benchmarks/short.yml benchmarks/long.yml --into README.md

Writes ``<results>/<protocol>.md``: scores per environment and seed, ratios to SAC, and over all environments the interquartile
mean and the probability that SDAC beats each of the others (Agarwal et al. 2021, "Deep RL at the edge of the statistical
precipice", with their library rliable). And learning curves, ``<results>/<protocol>.png`` against steps and
``<results>/<protocol>_time.png`` against wall-clock time (if there is more than one configuration).
Bands are 95 % bootstrap intervals over seeds; with two seeds they say little, so every seed's score is in the table.

A protocol of one configuration has nothing to compare: scores alone. One with a ``reference`` is an ablation of that
configuration: one line per configuration, with ratios to the reference, and no picture.
``--into`` also puts the text between the lines ``<!-- <protocol>.md -->`` and ``<!-- end of <protocol>.md -->`` of a page.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import yaml
from rliable import library, metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def read_results(folder: Path) -> pd.DataFrame:
    """
    :param folder: of the protocol's CSV files
    :return: their rows, with the mean return of each evaluation
    :raises SystemExit: if there are none, or seeds of one configuration come from different hyperparameters
    """
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise SystemExit(f"{folder} holds no results yet: run benchmarks/run.py first")
    rows = pd.concat([pd.read_csv(file, dtype={"returns": str}) for file in files], ignore_index=True)
    mixed = rows.groupby(["configuration", "env"])["config"].nunique()
    for configuration, env in mixed[mixed > 1].index:
        raise SystemExit(f"{folder}: the seeds of {configuration} on {env} come from different hyperparameters or versions")
    rows["return"] = [np.mean([float(value) for value in returns.split()]) for returns in rows["returns"]]
    return rows


def scores(rows: pd.DataFrame, n_timesteps: int, last: int) -> pd.DataFrame:
    """
    :param rows: see :func:`read_results`
    :param n_timesteps: environment steps of a finished run
    :param last: evaluations that make the score
    :return: one row per finished run: its score, best evaluation, updates and minutes
    """
    records = []
    for (configuration, env, seed), run in rows.sort_values("env_steps").groupby(["configuration", "env", "seed"], sort=False):
        if run["env_steps"].iloc[-1] >= n_timesteps:
            records.append(
                {
                    "configuration": configuration,
                    "env": env,
                    "seed": seed,
                    "score": run["return"].tail(last).mean(),
                    "last": run["return"].iloc[-1],
                    "best": run["return"].max(),
                    "updates": run["updates"].iloc[-1],
                    "minutes": run["wall_time"].iloc[-1] / 60,
                }
            )
    return pd.DataFrame(records)


def markdown(table: pd.DataFrame, order: list[str]) -> str:
    """
    :param table: see :func:`scores`
    :param order: configurations in the order of the protocol
    :return: one line per environment and configuration
    """
    ratio_column = ["ratio to SAC"] if "SAC" in order else []
    columns = ["environment", "configuration", "score, mean", "of each seed", *ratio_column]
    columns += ["last", "best", "updates", "minutes"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for env, runs in table.groupby("env"):
        means = runs.groupby("configuration")["score"].mean()
        for configuration in [name for name in order if name in means]:
            own = runs[runs["configuration"] == configuration].sort_values("seed")
            cells = [env, configuration, f"{means[configuration]:.0f}", ", ".join(f"{score:.0f}" for score in own["score"])]
            if ratio_column:
                cells.append(f"{means[configuration] / means['SAC']:.2f}" if means.get("SAC", 0) > 0 else "")
            cells += [f"{own[column].mean():.0f}" for column in ("last", "best", "updates", "minutes")]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def ablation(table: pd.DataFrame, order: list[str], reference: str) -> str:
    """
    :param table: see :func:`scores`
    :param order: configurations in the order of the protocol
    :param reference: the configuration that the others differ from
    :return: one line per configuration: in each environment its mean score, in brackets that of each seed, and the mean over
        the environments of its ratio to the reference
    """
    envs = sorted(table["env"].unique())
    own = table.pivot_table(index=["env", "seed"], columns="configuration", values="score")
    lines = ["| configuration | " + " | ".join(envs) + " | ratio |", "| --- |" + " --- |" * (len(envs) + 1)]
    for name in [name for name in order if name in own]:
        cells = []
        for env in envs:
            seeds = own.loc[env, name].dropna()
            each = ", ".join(f"{score:.0f}" for score in seeds)
            cells.append(f"{seeds.mean():.0f} ({each})" if len(seeds) else "")
        ratio = ""
        if reference in own:
            means = own[[name, reference]].groupby("env").mean().dropna().to_numpy()
            ratio = f"{(means[:, 0] / means[:, 1]).mean():.2f}" if len(means) and (means[:, 1] > 0).all() else ""
        lines.append("| " + " | ".join([name, *cells, ratio]) + " |")
    return "\n".join(lines) + "\n"


def insert(text: str, name: str, page: Path) -> None:
    """
    :param text: what to put into the page, in place of what stands there
    :param name: of the protocol
    :param page: a Markdown file with the two lines ``<!-- <name>.md -->`` and ``<!-- end of <name>.md -->``
    :raises SystemExit: if it has not got them
    """
    begin, end = f"<!-- {name}.md -->\n", f"<!-- end of {name}.md -->\n"
    before, found, rest = page.read_text().partition(begin)
    _, also_found, after = rest.partition(end)
    if not found or not also_found:
        raise SystemExit(f"{page} needs the lines {begin.strip()!r} and {end.strip()!r}, between which the report goes")
    page.write_text(f"{before}{begin}{text}{end}{after}")


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param values: of each seed at each evaluation, shape (seeds, evaluations)
    :return: mean, and lower and upper end of its bootstrap interval, each of shape (evaluations,)
    """
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5], axis=0)
    return values.mean(axis=0), low, high


def plot(rows: pd.DataFrame, order: list[str], path: Path, against_time: bool) -> None:
    """
    :param rows: see :func:`read_results`
    :param order: configurations in the order of the protocol
    :param path: of the picture
    :param against_time: minutes of training instead of environment steps
    """
    envs = list(rows["env"].drop_duplicates())
    figure, axes = plt.subplots(1, len(envs), figsize=(max(4.2 * len(envs), 6), 3.9), squeeze=False, layout="constrained")
    lines = {}
    for axis, env in zip(axes[0], envs, strict=True):
        for i, name in enumerate(order):
            runs = rows[(rows["env"] == env) & (rows["configuration"] == name)]
            if runs.empty:
                continue
            # By the number of the evaluation: runs that were interrupted may be some steps apart
            runs = runs.assign(number=runs.sort_values("env_steps").groupby("seed").cumcount())
            curves = runs.pivot_table(index="seed", columns="number", values="return").dropna(axis=1)
            mean, low, high = interval(curves.to_numpy())
            column, unit = ("wall_time", 60) if against_time else ("env_steps", 1000)
            x = runs.pivot_table(index="seed", columns="number", values=column)[curves.columns].mean() / unit
            (lines[name],) = axis.plot(x, mean, color=f"C{i}")
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
        axis.set(title=env, xlabel="minutes of training" if against_time else "environment steps, in thousands")
    axes[0, 0].set(ylabel="mean return of an evaluation")
    names = [name for name in order if name in lines]
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=min(len(names), 5))
    figure.savefig(path, dpi=80)
    plt.close(figure)


def aggregate(table: pd.DataFrame, order: list[str]) -> str:
    """
    Over all environments: interquartile mean of scores normalised by SAC's, and probability of improvement.

    :param table: see :func:`scores`
    :param order: configurations in the order of the protocol
    :return: a Markdown table, or what is missing for one
    """
    reference = table[table["configuration"] == "SAC"].groupby("env")["score"].mean()
    envs = [env for env in table["env"].drop_duplicates() if reference.get(env, 0) > 0]
    matrices = {}
    for name in order:
        runs = table[(table["configuration"] == name) & table["env"].isin(envs)]
        matrix = runs.pivot_table(index="seed", columns="env", values="score").reindex(columns=envs).dropna()
        if len(matrix) and envs:
            matrices[name] = (matrix / reference[envs]).to_numpy()  # (seeds, environments)
    if "SDAC" not in matrices or len(matrices) < 2:
        return (
            "No interquartile mean and probability of improvement: they take finished runs of configurations named SDAC and "
            "SAC, of the same seed in every environment, and environments in which SAC's score is positive.\n"
        )
    lines = ["| configuration | interquartile mean, SAC = 1 (95 % interval) | P(SDAC better) |", "| --- | --- | --- |"]
    state = np.random.RandomState(0)
    points, intervals = library.get_interval_estimates(
        matrices, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2000, random_state=state
    )
    for name, matrix in matrices.items():
        low, high = intervals[name][:, 0]
        better = "" if name == "SDAC" else f"{metrics.probability_of_improvement(matrices['SDAC'], matrix):.2f}"
        # From a single seed every resample is the same
        spread = f"{low:.2f} to {high:.2f}" if len(matrix) > 1 else "one seed"
        lines.append(f"| {name} | {points[name][0]:.2f} ({spread}) | {better} |")
    return "\n".join(lines) + "\n"


def report(path: Path, results: Path) -> str:
    """
    :param path: of the protocol
    :param results: folder of the protocols' rows, in which the report and its pictures are written, too
    :return: the report
    :raises SystemExit: see :func:`read_results`
    """
    protocol = yaml.safe_load(path.read_text())
    n_timesteps = int(float(protocol["n_timesteps"]))  # as run.py takes it
    rows = read_results(results / path.stem)
    order = list(protocol["configurations"])
    n_last = protocol["score_evaluations"]
    table = scores(rows, n_timesteps, n_last)
    text = (
        f"Score: {f'mean of the last {n_last} evaluations' if n_last > 1 else 'the last evaluation'}, "
        f"{protocol['eval_episodes']} deterministic episodes{' each' if n_last > 1 else ''}, after "
        f"{n_timesteps:,} environment steps. "
    )
    reference = protocol.get("reference")
    if reference is None:
        text += "Last and best: a single evaluation, mean over seeds. "
        tables = "" if table.empty else markdown(table, order)
        if tables and len(order) > 1:
            tables += "\n" + aggregate(table, order)
    else:
        text += f"In brackets that of each seed; ratio of the means to {reference}, mean over the environments. "
        tables = "" if table.empty else ablation(table, order, reference)
    text += f"Made by `python benchmarks/report.py {path}`.\n\n{tables}"
    target = results / f"{path.stem}.md"
    target.write_text(text)
    if reference is None:
        plot(rows, order, target.with_suffix(".png"), against_time=False)
        if len(order) > 1:
            plot(rows, order, target.with_name(f"{target.stem}_time.png"), against_time=True)
    return text


def main() -> None:
    """Write the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="+", type=Path, metavar="PROTOCOL")
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="a Markdown page to put the reports into, too")
    args = parser.parse_args()
    for path in args.protocols:
        text = report(path, args.results)
        if args.into is not None:
            insert(text, path.stem, args.into)
        print(text)


if __name__ == "__main__":
    main()
