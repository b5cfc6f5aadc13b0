"""Tokenize text into a .bin/.idx pair.

    megallama prepare corpus/ --tokenizer tokenizer.model --output data/corpus
    mpirun -n 8 megallama prepare corpus/ --tokenizer tokenizer.model --output data/corpus

Input: files, folders, patterns of JSON lines (.jsonl .json .ndjson), plain text (a file is a document), both also .gz
and .zst, and Parquet. Documents end with the end-of-document token that the tokenizer names, or --eos-token. The output
is the same for any number of processes and nodes. What was killed goes on when it is started again: PREFIX.parts keeps
what is done. Under mpirun or srun every rank is a process (with mpi4py, and a file system that all nodes see).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from megallama.commands.exit import exit_status
from megallama.commands.parser import Parser, filled, size
from megallama.config.errors import DataError, counted

MAX_DOCUMENT_MB = 16
SAYING = 0.5  # seconds in which mpirun, which ends all at once, passes on what was printed last
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # how many processes a launcher started


def run(argv: Sequence[str]) -> int:
    """Run as one process or as a rank; says how to go on after a failure. Raises: DataError."""
    args = parse(argv)
    comm = communicator(os.environ)
    try:
        status = exit_status(lambda: carry_out(args, comm))
    except BaseException:
        if comm:  # a fault of the program: without this the rank would wait in MPI's own exit for the others
            traceback.print_exc()
            time.sleep(SAYING)
            comm.Abort(1)
        raise
    if status and os.path.isdir(f"{args.output}.parts"):
        print(f"{args.output}.parts keeps what is done; the same command continues there", file=sys.stderr, flush=True)
    if status and comm:
        time.sleep(SAYING)
        comm.Abort(status)  # the other ranks would wait without end
    return status


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line; options have the names of `preprocess`'s parameters."""
    parser = Parser("prepare", __doc__)
    add = parser.add_argument
    add("inputs", nargs="+", help="files, folders or patterns")
    add("--output", required=True, type=filled, metavar="PREFIX", help="writes PREFIX.bin, PREFIX.idx and PREFIX.json")
    kinds = "SentencePiece .model, tokenizer.json, or their folder"
    add("--tokenizer", required=True, type=filled, dest="tokenizer_path", metavar="PATH", help=kinds)
    add("--workers", type=int, metavar="N", help="processes on this node (default: the cores); not with mpirun, srun")
    for name in ("valid", "test"):
        held = f"hold out this share of the documents: PREFIX_train, PREFIX_{name}"
        add(f"--split-{name}", type=float, default=0.0, metavar="SHARE", help=held)
    add_input_options(parser)
    add("--strict", action="store_true", help="stop at the first bad record instead of skipping it")
    longer = f"longer ones are bad records ({MAX_DOCUMENT_MB})"
    add("--max-document-mb", type=size, default=MAX_DOCUMENT_MB, metavar="MB", help=longer)
    own = "the tokenizer's own library even where a faster one is equal"
    add("--reference-encoder", dest="fast", action="store_false", help=own)
    add("--bos", action="store_true", help="begin every document with the tokenizer's bos, as LLaMA's own data do")
    ends = "end every document with this token (default: the one the tokenizer names)"
    add("--eos-token", metavar="TOKEN", help=ends)
    add("--quiet", action="store_true", help="no progress bar")
    return parser.read(argv)


def add_input_options(parser: Parser) -> None:
    """What commands that read text have in common."""
    parser.add_argument("--json-key", default="text", metavar="KEY", help="where the text is (default: text)")
    for name, share in (("", "0.1%% of all"), ("-per-file", "10%% of a file's")):
        more = f"fail if more records are bad (default: {share})"
        parser.add_argument(f"--max-bad{name}", default="", metavar="N|P%", help=more)
    skip = "go on where a file cannot be read, or not to its end"
    parser.add_argument("--skip-bad-files", action="store_true", help=skip)


def communicator(env: Mapping[str, str]) -> Any:
    """The ranks that mpirun or srun started, as an mpi4py communicator; None for a single process.

    Raises: DataError if MPI does not see all of them: each would do the whole job.
    """
    size = next((int(env[name]) for name in SIZES if env.get(name, "").isdigit()), 1)
    if size == 1:
        return None
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise DataError(
            f"{size} processes were started, which needs mpi4py and an MPI library ({error}); pip install mpi4py mpich"
        ) from None
    if size != MPI.COMM_WORLD.size:
        raise DataError(
            f"{size} processes were started but MPI connects {MPI.COMM_WORLD.size} of them; use the mpirun of the MPI "
            f"that mpi4py loads ({MPI.Get_library_version().split()[0]}), or srun --mpi=pmi2 or --mpi=pmix as it needs"
        )
    return MPI.COMM_WORLD


def carry_out(args: argparse.Namespace, comm: Any) -> int:
    """Do the work of this process; print what was written and what was skipped."""
    start = time.monotonic()
    if comm and comm.rank:
        from megallama.text.workers import rank_main

        rank_main(comm)
        return 0
    if comm and args.workers is not None:
        raise DataError("--workers does not go with mpirun or srun, where every rank is a process; leave it out")
    from megallama.text.preprocess import preprocess
    from megallama.text.progress import ByteProgress

    options = dict(vars(args), max_document_bytes=int(args.max_document_mb * (1 << 20)))
    options["workers"] = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    del options["max_document_mb"]
    with ByteProgress("tokenizing", quiet=options.pop("quiet")) as bar:
        summary = preprocess(**options, progress=bar.update, say=partial(print, file=sys.stderr, flush=True), comm=comm)
    seconds = time.monotonic() - start
    for out in summary.outputs:
        documents, tokens = counted(out.num_documents, "document", ","), counted(out.num_tokens, "token", ",")
        text = f"{counted(out.text_bytes, 'byte', ',')} of text ({out.text_bytes / out.num_tokens:.2f} per token)"
        print(f"{out.prefix}.bin: {documents}, {tokens}, {text}")
    size, number = sum(out.text_bytes for out in summary.outputs), sum(out.num_tokens for out in summary.outputs)
    rates = f"{size / seconds / 1e6:.1f} MB/s, {number / seconds / 1e6:.2f} M tokens/s"
    print(f"{summary.marks}; {seconds:.1f} s, {rates}; encoder: {summary.encoder}")
    for line in summary.losses.lines():
        print(line, file=sys.stderr)
    return 0
