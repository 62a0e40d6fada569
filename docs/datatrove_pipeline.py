"""data.py on many machines: its steps as blocks of datatrove.

datatrove (https://github.com/huggingface/datatrove) runs a pipeline of blocks on one machine, on a
Slurm cluster or with Ray. It is optional and not in requirements.txt:

    pip install datatrove orjson
    python docs/datatrove_pipeline.py --source ~/code --source ~/more.tar.gz --out big --workers 2

The first stage treats each file alone, in as many tasks as there are machines or cores: read,
filter by rules, decontaminate, replace private data, compute fingerprints. The second stage sees
all documents at once: duplicates, validation set. The result, big/data, holds the same documents as
that of `python data.py`, byte for byte, and pretrain.py --out big trains on it.

On a cluster, give both stages a folder that all machines share, and replace the executors by

    SlurmPipelineExecutor(pipeline=..., tasks=1000, workers=100, time="04:00:00", partition="cpu",
                          cpus_per_task=1, mem_per_cpu_gb=4, venv_path=".venv/bin/activate",
                          logging_dir="/shared/logs/clean", depends=None)
    RayPipelineExecutor(pipeline=..., tasks=1000, workers=100, cpus_per_task=1, mem_per_cpu_gb=4,
                        logging_dir="/shared/logs/clean", depends=None)     # after ray.init()

with depends=<the first executor> and tasks=1 in the second stage. Tasks that have finished are
skipped when the same command runs again.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (broken_rule, build_corpus, decoded, default_benchmarks,  # noqa: E402
                  describe, fingerprints, load_contamination)
from support.corpus import funnel, write_corpus  # noqa: E402
from support.private_data import replace_private  # noqa: E402
from support.sources import file_batches, read_batch  # noqa: E402


class ReadSources(PipelineStep):
    """The files of the sources, each task its share of them. A file that holds no text keeps the
    reason in its metadata, as do those that later blocks drop, so that every file is counted."""

    name, type = "read sources", "READER"

    def __init__(self, sources):
        super().__init__()
        self.sources = sources

    def run(self, data=None, rank=0, world_size=1):
        batches = [batch for source in self.sources for batch in file_batches(source)]
        for number in range(rank, len(batches), world_size):
            for position, file in enumerate(read_batch(batches[number])):
                row = {**describe(file, batches[number]), **decoded(file, batches[number])}
                text = row.pop("text", None) or row["reason"]           # datatrove wants a text
                yield Document(text, f"{number:06}/{position:06}", metadata=row)


class Block(PipelineStep):
    """A block that changes documents one at a time, unless they have been dropped."""

    type = "FILTER"

    def run(self, data, rank=0, world_size=1):
        for document in data:
            if "reason" not in document.metadata:
                self.change(document)
            yield document


class Rules(Block):
    name = "rules"

    def change(self, document):
        broken = broken_rule(document.text, document.metadata["language"])
        if broken:
            rule, value = broken
            document.metadata.update(reason=rule, value=value)


class Decontaminate(Block):
    name = "decontaminate"

    def __init__(self, benchmark_files):
        super().__init__()
        self.benchmark_files = tuple(benchmark_files)

    def change(self, document):
        hit = load_contamination(self.benchmark_files).hit(document.text)
        if hit:
            document.metadata.update(reason="contaminated", value=hit)


class ReplacePrivateData(Block):
    name = "replace private data"

    def change(self, document):
        document.text = replace_private(document.text)


class Fingerprints(Block):
    name = "fingerprints"

    def change(self, document):
        found = fingerprints(document.text)
        document.metadata.update(found, same=found["same"].hex(),       # as JSON can hold them
                                 signature=found["signature"].tolist())


class BuildCorpus(PipelineStep):
    """Duplicates and the validation set: for this, all documents have to be in one place."""

    name, type = "build corpus", "DEDUP"

    def __init__(self, sources, benchmark_files, out):
        super().__init__()
        self.sources, self.benchmark_files, self.out = sources, benchmark_files, out

    def run(self, data, rank=0, world_size=1):
        rows = []
        for document in sorted(data, key=lambda document: document.id):
            row = {field: value for field, value in document.metadata.items()
                   if field != "file_path"}                             # JsonlReader's own
            if "reason" not in row:
                row["text"] = document.text
                row["same"] = bytes.fromhex(row["same"])
                row["signature"] = np.array(row["signature"], np.uint32)
            rows.append(row)
        rows, parts, stages = build_corpus(rows, self.sources)
        write_corpus(Path(self.out) / "data", rows, parts, {
            "sources": self.sources, "benchmarks": [Path(file).name for file in
                                                    self.benchmark_files],
            "funnel": funnel(rows), "grounding": stages})
        yield from ()


def main():
    parser = argparse.ArgumentParser(description="Build a corpus with datatrove.")
    parser.add_argument("--source", action="append", required=True, help="as in data.py")
    parser.add_argument("--out", required=True, help="root folder")
    parser.add_argument("--workers", type=int, default=2, help="processes, and tasks of stage 1")
    args = parser.parse_args()
    benchmark_files = default_benchmarks()
    cleaned = f"{args.out}/cleaned"                     # between the stages: one file per task
    clean = LocalPipelineExecutor(
        [ReadSources(args.source), Rules(), Decontaminate(benchmark_files), ReplacePrivateData(),
         Fingerprints(), JsonlWriter(cleaned)],
        tasks=args.workers, workers=args.workers, logging_dir=f"{args.out}/logs/clean")
    corpus = LocalPipelineExecutor(
        [JsonlReader(cleaned), BuildCorpus(args.source, benchmark_files, args.out)],
        tasks=1, depends=clean, logging_dir=f"{args.out}/logs/corpus")
    corpus.run()


if __name__ == "__main__":
    main()
