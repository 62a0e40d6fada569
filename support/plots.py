"""All figures."""

import math
import statistics


def new_figure(**options):
    # imported here, because it takes half a second and most commands draw nothing
    from matplotlib.figure import Figure
    return Figure(**options)


def save_curves(figure, path):
    """Add a grid and, where curves have names, a legend; then write the file."""
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
    figure.savefig(path, dpi=110)


def plot_training(metrics, path, phase_start=0):
    """Training loss, and bits per byte of the validation set next to those of compressors.

    metrics: rows of metrics.jsonl (step, loss, ...); those with "bpb" are measurements.
    phase_start: the step at which the repository phase begins, 0 for none.
    """
    figure = new_figure(figsize=(12, 4.5), layout="constrained")
    training, validation = figure.subplots(1, 2)
    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    window = len(metrics) // 20             # steps before and after
    means = [statistics.fmean(losses[max(0, i - window):i + window + 1])
             for i in range(len(losses))]
    training.plot(steps, losses, color="C0", alpha=0.3, label="one step")
    training.plot(steps, means, color="C0", label="moving average")
    training.set(title="Training", xlabel="step", ylabel="loss (nats per token)")
    measured = [row for row in metrics if "bpb" in row]
    if measured:
        validation.plot([row["step"] for row in measured], [row["bpb"] for row in measured], "o-",
                        color="C0", label="model")
        for name, color in (("gzip", "C3"), ("bz2", "C1"), ("xz", "C2")):
            if name in measured[-1]:
                validation.axhline(measured[-1][name], ls="--", color=color,
                                   label=f"{name} {measured[-1][name]:.2f}")
        validation.set(title="Validation set: code", xlabel="step", ylabel="bits per byte")
    if phase_start:
        for axes in (training, validation):
            axes.axvline(phase_start, color="0.5", ls=":", label="repository phase begins")
    save_curves(figure, path)


def plot_positions(curves, T, path):
    """Bits per byte by position in a sequence of T tokens; curves: name -> one value per part."""
    figure = new_figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        centers = [(part + 0.5) * T / len(values) for part in range(len(values))]
        axes.plot(centers, values, "o-", label=name)
    axes.set(title="Bits per byte by position", xlabel="position in the sequence (tokens)",
             ylabel="bits per byte of the validation set (code)")
    save_curves(figure, path)


def plot_scores(rows, path):
    """Histograms of the checklist scores of conversations, by source; rows: of train.jsonl."""
    figure = new_figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for source in dict.fromkeys(row["source"] for row in rows):
        scores = [row["score"] for row in rows if row["source"] == source]
        axes.hist(scores, bins=[i / 50 for i in range(51)], histtype="step", lw=2,
                  label=f"{source}: {len(scores):,}")
    axes.set(title="Checklist scores of the conversations", xlabel="score", yscale="log",
             ylabel="conversations")
    save_curves(figure, path)


def plot_preferences(metrics, path):
    """The loss of preference pairs, which starts at ln 2, their rewards, and their accuracy.
    metrics: rows of metrics.jsonl."""
    figure = new_figure(figsize=(11, 4), layout="constrained")
    loss, rewards, accuracy = figure.subplots(1, 3)
    loss.axhline(math.log(2), ls="--", color="C3", label="ln 2: nothing learned")
    accuracy.set_ylim(0, 1.03)
    for axes, title, unit, names in (
            (loss, "Loss of pairs", "nats per pair", ["loss/preference"]),
            (rewards, "Rewards", "nats per answer", ["rewards/chosen", "rewards/rejected"]),
            (accuracy, "Accuracy", "share of pairs with a positive margin",
             ["rewards/accuracies"])):
        for name in names:
            axes.plot([row["step"] for row in metrics], [row[name] for row in metrics], label=name)
        axes.set(title=title, xlabel="step", ylabel=unit)
    save_curves(figure, path)


def plot_funnel(table, path):
    """How many bytes were dropped for each reason, and the languages of the rest.
    table: group ("reason", "language") -> name -> {"bytes": ..., "text": ...}."""
    figure = new_figure(figsize=(10, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, group, field, title in ((left, "reason", "bytes", "What became of the files"),
                                      (right, "language", "text", "Languages of what was kept")):
        items = sorted(table[group].items(), key=lambda item: -item[1][field])[:16]
        colors = ["C2" if name == "kept" or group == "language" else "0.5" for name, _ in items]
        bars = axes.barh([name for name, _ in items],
                         [entry[field] / 1e6 for _, entry in items], color=colors)
        axes.bar_label(bars, fmt="{:.3g}", padding=2)
        axes.invert_yaxis()
        axes.margins(x=0.18)
        axes.set(title=title, xlabel="MB")
    figure.savefig(path, dpi=110)


def plot_grounding(stages, path):
    """The megabytes left after each stage of the grounding filter, and their quality score."""
    names = [f"stage {number}" for number in range(1, len(stages) + 1)]
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar(names, [stage["bytes"] / 1e6 for stage in stages], color="0.6")
    axes.bar_label(bars, [f"{stage['bytes'] / 1e6:.1f} MB" for stage in stages])
    axes.set(title="Text-code grounding, from coarse to fine", ylabel="left after the stage (MB)")
    axes.margins(y=0.1)
    scores = axes.twinx()
    scores.plot(names, [stage["mean score"] for stage in stages], "o-", color="C2")
    scores.set_ylabel("mean quality score of what is left", color="C2")
    scores.set_ylim(0)
    figure.savefig(path, dpi=110)


def plot_infilling(examples, path):
    """Infilled middles in color, with the lines around them and the ground truth in gray.

    examples: (title, prefix, infilled middle, suffix, true middle) of each.
    """
    lines = []                                  # each a list of (text, color)
    for title, prefix, infilled, suffix, truth in examples:
        parts = [(f"{title}\n", "tab:blue"), ("\n".join(prefix.split("\n")[-5:]), "black"),
                 ("\n".join(infilled.split("\n")[:8]) or "(nothing)", "tab:green"),
                 ("\n".join(suffix.split("\n")[:4]) + "\n", "black"),
                 (f"ground truth: {truth}\n\n", "tab:gray")]
        lines.append([])
        for text, color in parts:
            first, *others = text.split("\n")
            lines[-1].append((first, color))    # a part begins on the last line of the one before
            lines += [[(line, color)] for line in others]
    figure = new_figure(figsize=(9, 0.19 * len(lines)))
    for i, line in enumerate(lines):
        column = 1
        for text, color in line:
            if column + len(text) >= 119:
                text = text[:118 - column] + "…"
            # a character of 9 points in a monospaced font is 0.0753 inches wide
            figure.text(column * 0.0753 / 9, 1 - (i + 1) / (len(lines) + 1), text, color=color,
                        family="monospace", fontsize=9, va="center", parse_math=False)
            column += len(text)
    figure.savefig(path, dpi=120)


def plot_needle(name, rows, lengths, depths, path):
    """A heat map; rows: for each depth of the needle, the value for each context length."""
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    largest = 100 if "%" in name else max(0, *map(max, rows))
    image = axes.imshow(rows, cmap="YlGn", aspect="auto", vmin=0, vmax=largest)
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.2f}", ha="center", va="center",
                      color="white" if value > 0.7 * largest else "black")
    axes.set(title=f"Needle in the code: {name}", xlabel="tokens of context",
             ylabel="depth of the function", xticks=range(len(lengths)), xticklabels=lengths,
             yticks=range(len(depths)), yticklabels=[f"{depth:.0%}" for depth in depths])
    figure.colorbar(image, label=name)
    figure.savefig(path, dpi=120)


def plot_ladder(models, path):
    """pass@1 by level: {name of a model: its share of solved problems on each level}."""
    figure = new_figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    by_total = sorted(models.items(), key=lambda item: sum(item[1]))
    for name, shares in by_total:
        levels = range(1, len(shares) + 1)
        total = 100 * sum(shares) / len(shares)         # all levels have equally many problems
        axes.plot(levels, [100 * share for share in shares], "o-", label=f"{name}: {total:.0f} %")
    axes.set(title="The ladder", xlabel="level", ylabel="problems solved, %", ylim=(-2, 102))
    axes.legend()
    figure.savefig(path, dpi=120)
