"""
Tables and pictures of the runs of one or several protocols, from the rows that ``run.py`` left.

    python benchmarks/report.py my.yml
    python benchmarks/report.py benchmarks/short.yml benchmarks/long.yml benchmarks/ablation.yml benchmarks/invariance.yml \
        --into docs/results.md
    python benchmarks/report.py benchmarks/short.yml --summary README.md

The first writes ``<results>/my.md`` and ``<results>/my.png``. The second puts each report between the lines
``<!-- short -->`` and ``<!-- /short -->`` of a page, and the pictures into the folder ``images`` beside it. The third puts one
small table between ``<!-- results -->`` and ``<!-- /results -->``.

A report has the scores per environment and seed, ratios to SAC, and over all environments the interquartile mean and the
probability that SDAC beats each of the others (Agarwal et al. 2021, "Deep RL at the edge of the statistical precipice", with
their library rliable). Its picture has learning curves. Bands are 95 % bootstrap intervals over seeds.

A protocol of one configuration has nothing to compare: scores alone. One with a ``reference`` is an ablation of that
configuration: one line per configuration, with ratios to the reference, and no picture. A protocol may name its ``picture``
(by default the protocol's name), the picture's ``title`` and a file of ``peers``: others' final returns, drawn as lines.
"""

import argparse
import textwrap
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
import yaml
from rliable import library, metrics

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
PEER_COLOURS = ["tab:orange", "tab:green", "tab:red", "tab:purple", "black"]


def read_results(table: Path, work: Path | None = None) -> pd.DataFrame:
    """
    :param table: the protocol's rows of finished runs
    :param work: folder of the protocol's runs that go on, whose rows are read, too
    :return: the rows, with the mean return of each evaluation
    :raises SystemExit: if there are none, or seeds of one configuration come from different hyperparameters
    """
    files = [table] * table.exists() + (sorted(work.glob("*/rows.csv")) if work is not None else [])
    if not files:
        raise SystemExit(f"{table} holds no results yet: run benchmarks/run.py first")
    text = {"returns": str, "commit": str, "config": str}
    rows = pd.concat([pd.read_csv(file, dtype=text) for file in files], ignore_index=True)
    rows = rows.drop_duplicates(["configuration", "env", "seed", "env_steps"])  # killed between table and folder
    mixed = rows.groupby(["configuration", "env"])["config"].nunique()
    for configuration, env in mixed[mixed > 1].index:
        raise SystemExit(f"{table}: the seeds of {configuration} on {env} come from different hyperparameters or versions")
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


def markdown(table: pd.DataFrame, order: list[str], with_last: bool) -> str:
    """
    :param table: see :func:`scores`
    :param order: configurations in the order of the protocol
    :param with_last: a column of the last evaluation, where the score is another figure
    :return: one line per environment and configuration
    """
    ratio_column = ["ratio to SAC"] if "SAC" in order else []
    single = ["last", "best", "minutes"] if with_last else ["best", "minutes"]
    columns = ["environment", "configuration", "score", "each seed", *ratio_column, *single]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for env, runs in table.groupby("env"):
        means = runs.groupby("configuration")["score"].mean()
        for configuration in [name for name in order if name in means]:
            own = runs[runs["configuration"] == configuration].sort_values("seed")
            cells = [env, configuration, f"{means[configuration]:.0f}", ", ".join(f"{score:.0f}" for score in own["score"])]
            if ratio_column:
                cells.append(f"{means[configuration] / means['SAC']:.2f}" if means.get("SAC", 0) > 0 else "")
            cells += [f"{own[column].mean():.0f}" for column in single]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def summary(table: pd.DataFrame, envs: list[str], order: list[str]) -> str:
    """
    :param table: see :func:`scores`
    :param envs: environments in the order of the protocol
    :param order: configurations in the order of the protocol
    :return: one line per environment, one column per configuration with its mean score
    """
    means = table.pivot_table(index="env", columns="configuration", values="score")
    names = [name for name in order if name in means]
    lines = ["| " + " | ".join(["", *names]) + " |", "| --- |" + " --- |" * len(names)]
    for env in [env for env in envs if env in means.index]:
        cells = ["" if np.isnan(means.loc[env, name]) else f"{means.loc[env, name]:.0f}" for name in names]
        lines.append("| " + " | ".join([env, *cells]) + " |")
    return "\n".join(lines) + "\n"


def peers_table(peers: pd.DataFrame) -> str:
    """
    :param peers: others' final returns, one row per algorithm and environment
    :return: one line per algorithm
    """
    envs = list(peers["env"].drop_duplicates())
    columns = ["algorithm", "updates per step", "seeds", *envs]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for name, own in peers.groupby("algorithm", sort=False):
        cells = [f"{row['mean']} ± {row['std']}" for _, row in own.set_index("env").loc[envs].iterrows()]
        first = own.iloc[0]
        lines.append("| " + " | ".join([str(name), str(first["updates_per_step"]), str(first["seeds"]), *cells]) + " |")
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


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """
    :param values: of each seed at each evaluation, shape (seeds, evaluations)
    :return: mean, and lower and upper end of its bootstrap interval, each of shape (evaluations,)
    """
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), [2.5, 97.5], axis=0)
    return values.mean(axis=0), low, high


def span(numbers: list[int]) -> str:
    """:return: a number, or the least and the largest of several"""
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def plot(
    rows: pd.DataFrame,
    order: list[str],
    path: Path,
    against_time: bool = False,
    title: str = "",
    peers: pd.DataFrame | None = None,
) -> None:
    """
    :param rows: see :func:`read_results`
    :param order: configurations in the order of the protocol; the first is drawn thicker
    :param path: of the picture
    :param against_time: minutes of training instead of environment steps
    :param title: above everything
    :param peers: others' final returns in these environments of whatever version, drawn as lines
    """
    envs = list(rows["env"].drop_duplicates())
    n_columns = min(len(envs), 3)
    n_lines = -(-len(envs) // n_columns)
    figure, axes = plt.subplots(
        n_lines, n_columns, figsize=(max(4 * n_columns, 6), 3.6 * n_lines + 0.9), squeeze=False, layout="constrained"
    )
    handles: dict[str, Any] = {}
    for axis, env in zip(axes.flat, envs, strict=False):
        n_seeds = []
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
            (handles[name],) = axis.plot(x, mean, color=f"C{i}", linewidth=2.4 if i == 0 else 1.4, zorder=3 - (i > 0))
            axis.fill_between(x, low, high, color=f"C{i}", alpha=0.2, linewidth=0)
            n_seeds.append(len(curves))
        if peers is not None:
            own = peers[peers["env"].str.split("-v").str[0] == env.split("-v")[0]]
            for i, (_, peer) in enumerate(own.iterrows()):
                version = peer["env"].split("-")[-1]
                updates = f"{peer['updates_per_step']} update{'s' if peer['updates_per_step'] > 1 else ''} per step"
                label = f"{peer['algorithm']}: {version}, {updates}, {peer['seeds']} seeds"
                style = (0, (6 - i, 1 + i))
                handles[label] = axis.axhline(
                    peer["mean"], color=PEER_COLOURS[i % len(PEER_COLOURS)], linewidth=1.2, linestyle=style
                )
        axis.set_title(f"{env} ({span(n_seeds)} seed{'s' if max(n_seeds) > 1 else ''})")
        axis.set(xlabel="minutes of training" if against_time else "environment steps (thousands)")
        axis.set_ylim(bottom=min(0, axis.get_ylim()[0]))  # a dip must not look like a collapse
        axis.grid(alpha=0.3)
    for row in axes:
        row[0].set(ylabel="return, mean of an evaluation")
    for spare in axes.flat[len(envs) :]:
        spare.set_axis_off()
    names = [*(name for name in order if name in handles), *(name for name in handles if name not in order)]
    legend = [handles[name] for name in names]
    if len(envs) < axes.size:
        axes.flat[-1].legend(legend, names, loc="center", fontsize=9, frameon=False)
    else:
        figure.legend(legend, names, loc="outside lower center", ncols=min(len(names), 5), frameon=False)
    note = "line: mean over seeds, band: 95 % bootstrap interval, y from 0 or the least value"
    figure.suptitle(f"{title}\n({note})" if title else note, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
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


def read_protocol(path: Path, results: Path, work: Path | None) -> tuple[dict[str, Any], pd.DataFrame, pd.DataFrame]:
    """
    :param path: of the protocol
    :param results: folder of the tables
    :param work: folder of the runs that go on, if their rows are wanted
    :return: the protocol, its rows, and the scores of its finished runs
    :raises SystemExit: see :func:`read_results`
    """
    protocol = yaml.safe_load(path.read_text())
    protocol["n_timesteps"] = int(float(protocol["n_timesteps"]))  # as run.py takes it
    rows = read_results(results / f"{path.stem}.csv", work and work / path.stem)
    return protocol, rows, scores(rows, protocol["n_timesteps"], protocol["score_evaluations"])


def setting(protocol: dict[str, Any], table: pd.DataFrame) -> str:
    """:return: what a score is"""
    n_last = protocol["score_evaluations"]
    text = f"Score: mean return of the last {'evaluation' if n_last == 1 else f'{n_last} evaluations'}, "
    text += f"{protocol['eval_episodes']} deterministic episodes{' each' if n_last > 1 else ''}, "
    text += f"after {protocol['n_timesteps']:,} environment steps"
    # In hundreds: 16 environments, or an interruption by hand, may make a run some updates longer or shorter
    return text + ("." if table.empty else f" and {span([round(n, -2) for n in table['updates']])} gradient updates.")


def report(path: Path, results: Path, page: Path | None, work: Path | None, with_time: bool) -> str:
    """
    Make a report and draw its picture.

    :param path: of the protocol
    :param results: folder of the tables, and of the pictures if there is no page
    :param page: a Markdown page that the report is for, with the folder ``images`` beside it for pictures
    :param work: folder of the runs that go on, if they are to be in the picture
    :param with_time: draw returns against time, too
    :return: the report
    :raises SystemExit: see :func:`read_results`
    """
    protocol, rows, table = read_protocol(path, results, work)
    order = list(protocol["configurations"])
    n_last, reference = protocol["score_evaluations"], protocol.get("reference")
    peers = pd.read_csv(results / protocol["peers"]) if "peers" in protocol else None
    text = setting(protocol, table)
    if reference is None:
        text += f" {'Last and best: one' if n_last > 1 else 'Best: one'} evaluation, mean over seeds."
        tables = "" if table.empty else markdown(table, order, n_last > 1)
        if tables and len(order) > 1:
            tables += "\n" + aggregate(table, order)
        if tables and peers is not None:
            tables += "\n" + peers_table(peers)
    else:
        text += f" In brackets: each seed. Ratio: means divided by those of {reference}, mean over the environments."
        tables = "" if table.empty else ablation(table, order, reference)
    commits = ", ".join(sorted(rows["commit"].unique()))
    text = textwrap.fill(f"{text} Rows: `{path.stem}.csv`, of commit {commits}.", 118, break_on_hyphens=False)
    text += f"\nMade by `python benchmarks/report.py {path}`.\n\n{tables}"
    picture = (results if page is None else page.parent / "images") / protocol.get("picture", f"{path.stem}.png")
    if reference is None:
        plot(rows, order, picture, title=protocol.get("title", ""), peers=peers)
        if with_time:
            time_picture = picture.with_name(f"{picture.stem}_time.png")
            plot(rows, order, time_picture, against_time=True, title=protocol.get("title", ""))
    return text


def main() -> None:
    """Write the reports."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("protocols", nargs="+", type=Path, metavar="PROTOCOL")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the tables of finished runs")
    parser.add_argument("--work", type=Path, help="folder of the runs that go on, to see them in the pictures, too")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="a Markdown page to put the reports into")
    parser.add_argument("--summary", type=Path, metavar="PAGE", help="only put one small table into a Markdown page")
    parser.add_argument("--time", action="store_true", help="also draw returns against the time of training")
    args = parser.parse_args()
    from pages import insert  # beside this script; --help does without

    for path in args.protocols:
        if args.summary is None:
            text = report(path, args.results, args.into, args.work, args.time)
            if args.into is None:
                (args.results / f"{path.stem}.md").write_text(text, encoding="utf-8")
            else:
                insert(text, path.stem, args.into)
            print(text)
            continue
        protocol, _, table = read_protocol(path, args.results, args.work)
        n_seeds = span(list(table.groupby(["env", "configuration"]).size()))
        text = f"{setting(protocol, table).removesuffix('.')}; mean of {n_seeds} seeds.\n\n"
        text += summary(table, protocol["envs"], list(protocol["configurations"]))
        insert(text, "results", args.summary)


if __name__ == "__main__":
    main()
