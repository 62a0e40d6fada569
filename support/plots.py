"""All figures."""

import math
import statistics

from matplotlib.figure import Figure


def plot_training(metrics, path, phase_start=0):
    """Training loss, and bits per byte of the validation set next to those of compressors.

    metrics: rows of metrics.jsonl (step, loss, ...); those with "bpb" are measurements.
    phase_start: the step at which the repository phase begins, 0 for none.
    """
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    training, validation = figure.subplots(1, 2)
    steps = [row["step"] for row in metrics]
    losses = [row["loss"] for row in metrics]
    near = len(metrics) // 20
    means = [statistics.fmean(losses[max(0, i - near):i + near + 1]) for i in range(len(losses))]
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
    for axes in (training, validation):
        if phase_start:
            axes.axvline(phase_start, color="0.5", ls=":", label="repository phase begins")
        if axes.get_legend_handles_labels()[0]:
            axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


def plot_positions(curves, T, path):
    """Bits per byte by position in a sequence of T tokens; curves: name -> one value per part."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        centers = [(part + 0.5) * T / len(values) for part in range(len(values))]
        axes.plot(centers, values, "o-", label=name)
    axes.set(title="Bits per byte by position", xlabel="position in the sequence (tokens)",
             ylabel="bits per byte of the validation set (code)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def plot_scores(rows, path):
    """Histograms of the checklist scores of conversations, by source; rows: of train.jsonl."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for source in dict.fromkeys(row["source"] for row in rows):
        scores = [row["score"] for row in rows if row["source"] == source]
        axes.hist(scores, bins=[i / 50 for i in range(51)], histtype="step", lw=2,
                  label=f"{source}: {len(scores):,}")
    axes.set(title="Checklist scores of the conversations", xlabel="score", yscale="log",
             ylabel="conversations")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)


def plot_preferences(metrics, path):
    """The loss of preference pairs, which starts at ln 2, their rewards, and their accuracy.
    metrics: rows of metrics.jsonl."""
    figure = Figure(figsize=(11, 4), layout="constrained")
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
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=110)
