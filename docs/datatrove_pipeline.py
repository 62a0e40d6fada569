"""data.py on many machines: its steps as blocks of datatrove, which runs pipelines of blocks.

datatrove (https://github.com/huggingface/datatrove) is optional and not in requirements.txt:

    pip install datatrove orjson
    python docs/datatrove_pipeline.py --source ~/code --source ~/more.tar.gz --out big --workers 2

The first stage treats each file alone, in parallel tasks: read, drop by rules, decontaminate,
replace private data, compute fingerprints. The second stage, one task that holds all documents in
memory, drops duplicates and splits. big/data then has the same documents as after data.py.

On a cluster, put the sources, --out and this repository on a disk that all machines share, run
`export PYTHONPATH=/shared/minicoder/docs`, and use one of these for LocalPipelineExecutor:

    SlurmPipelineExecutor(blocks, tasks=1000, time="04:00:00", partition="cpu", workers=100,
                          cpus_per_task=1, mem_per_cpu_gb=4, venv_path="/shared/venv/bin/activate",
                          logging_dir="/shared/big/logs/clean")
    RayPipelineExecutor(blocks, tasks=1000, workers=100, cpus_per_task=1, mem_per_cpu_gb=4,
                        logging_dir="/shared/big/logs/clean")   # after ray.init(runtime_env=
                                # {"env_vars": {"PYTHONPATH": "/shared/minicoder/docs"}})

The second stage gets tasks=1, depends=<the first executor>, its own logging_dir and more memory. A
task reads whole archives, or 256 files of a folder at a time, so more tasks than these do not help.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

try:
    from datatrove.data import Document
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.base import PipelineStep
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.writers import JsonlWriter
except ImportError as error:
    sys.exit(f"{error}; pip install datatrove orjson")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from data import (broken_rule, build_corpus, decoded, default_benchmarks,  # noqa: E402
                  describe, drop, fingerprints, load_contamination)
from support.corpus import funnel, write_corpus  # noqa: E402
from support.files import InputError, read_json, run, write_json  # noqa: E402
from support.private_data import replace_private  # noqa: E402
from support.sources import file_batches, read_batch  # noqa: E402


class ReadFiles(PipelineStep):
    """Files as documents. Metadata: their row in data.py, with the reason if a file is dropped."""
    name = "read files"
    type = "READER"

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def run(self, data=None, rank=0, world_size=1):
        for number in range(rank, len(self.batches), world_size):
            batch = self.batches[number]
            for position, file in enumerate(read_batch(batch)):
                row = {**describe(file, batch), **decoded(file, batch)}
                text = row.pop("text", "no text")           # JsonlReader skips empty documents
                yield Document(text, f"{number:09}/{position:09}", metadata=row)


class EachFile(PipelineStep):
    """Calls a function with each document that has not been dropped yet."""
    type = "FILTER"

    def __init__(self, function, *arguments):
        self.name = function.__name__
        super().__init__()
        self.function = function
        self.arguments = arguments

    def run(self, data, rank=0, world_size=1):
        for document in data:
            if "reason" not in document.metadata:
                self.function(document, document.metadata, *self.arguments)
            yield document


def apply_rules(document, row):
    broken = broken_rule(document.text, row["language"])
    if broken:
        drop(row, *broken)


def decontaminate(document, row, benchmark_files):
    hit = load_contamination(benchmark_files).hit(document.text)
    if hit:
        drop(row, "contaminated", hit)


def replace_private_data(document, row):
    document.text = replace_private(document.text)


def add_fingerprints(document, row):
    row.update(fingerprints(document.text))
    row["same"] = row["same"].hex()                         # JSON holds neither bytes nor arrays
    row["signature"] = row["signature"].tolist()


class BuildCorpus(PipelineStep):
    """Drops duplicates and splits, for which all documents have to be in one place."""
    name = "build corpus"
    type = "DEDUP"

    def __init__(self, sources, benchmark_files, folder):
        super().__init__()
        self.sources = sources
        self.benchmark_files = benchmark_files
        self.folder = folder

    def run(self, data, rank=0, world_size=1):
        rows = []
        for document in sorted(data, key=lambda document: document.id):
            row = document.metadata
            if "reason" not in row:
                row.update(text=document.text, same=bytes.fromhex(row["same"]),
                           signature=np.array(row["signature"], np.uint32))
            rows.append(row)
        rows, parts, stages = build_corpus(rows, self.sources)
        benchmark_names = [Path(file).name for file in self.benchmark_files]
        write_corpus(self.folder, rows, parts, {
            "sources": self.sources, "benchmarks": benchmark_names,
            "funnel": funnel(rows), "grounding": stages})
        return []


def main():
    parser = argparse.ArgumentParser(description="Build a corpus with datatrove.")
    parser.add_argument("--source", action="append", required=True, help="as in data.py")
    parser.add_argument("--out", type=Path, required=True, help="root folder")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    args = parser.parse_args()
    batches = [batch for source in args.source for batch in file_batches(source)]
    benchmark_files = tuple(default_benchmarks())
    # datatrove skips the tasks whose logs say that they have finished, whatever they worked on
    settings = {"sources": args.source, "workers": args.workers}
    logs = args.out / "logs"
    if not logs.exists():
        logs.mkdir(parents=True)
        write_json(logs / "manifest.json", settings)
    if read_json(logs / "manifest.json") != settings:
        raise InputError(f"{args.out} has other sources or workers; give another --out")
    cleaned = str(args.out / "cleaned")                     # between the stages: a file per task
    blocks = [ReadFiles(batches), EachFile(apply_rules), EachFile(decontaminate, benchmark_files),
              EachFile(replace_private_data), EachFile(add_fingerprints), JsonlWriter(cleaned)]
    clean = LocalPipelineExecutor(blocks, tasks=args.workers, workers=args.workers,
                                  logging_dir=str(logs / "clean"))
    blocks = [JsonlReader(cleaned), BuildCorpus(args.source, benchmark_files, args.out / "data")]
    LocalPipelineExecutor(blocks, depends=clean, logging_dir=str(logs / "corpus")).run()


if __name__ == "__main__":
    # other machines load the blocks by the name of their module, which must not be __main__
    import datatrove_pipeline
    run(datatrove_pipeline.main)
