"""The rows of the table of faults (tests/faults/table.py)."""

from __future__ import annotations

from typing import NamedTuple

CRASHES, DAMAGE, MANAGER = "checkpoint/test_crashes.py::", "checkpoint/test_damage.py::", "checkpoint/test_manager.py::"
LOCK, LOOP, WATCH = "checkpoint/test_lock.py::", "train/test_loop.py::", "train/test_watch.py::"
SUPERVISOR, REPLACEMENT, RANKS = (f"faults/test_{name}.py::" for name in ("supervisor", "replacement", "ranks"))


class Row(NamedTuple):
    """One fault. `without`: where there is no test, why."""

    number: int
    fault: str
    what: str
    tests: tuple[str, ...] = ()
    without: str = ""


ROWS = (
    # ---- saving ----
    Row(
        1,
        "one rank is killed at some point of a save",
        "the next start takes the newest checkpoint that was committed, bit by bit, and clears the rest away",
        (f"{CRASHES}test_one_rank_of_several_is_killed", f"{MANAGER}test_crash_leftovers_are_cleaned_at_the_start"),
    ),
    Row(
        2,
        "a kill at the K-th call of a save that changes a file, for every K",
        "the same",
        (f"{CRASHES}test_killed_at_every_call_of_a_save",),
    ),
    Row(
        3,
        "kills at random moments, again and again",
        "every start goes on; the end is bitwise that of an undisturbed run",
        (
            f"{REPLACEMENT}test_a_killed_and_a_frozen*",
            f"{REPLACEMENT}test_without_copies*",
            "faults/test_leaks.py",
            "recovery/test_generations.py",
        ),
    ),
    Row(
        4,
        "the disk is full while a shard is written",
        "folder, needed and free bytes are told; the checkpoint before stays; training goes on to the next save",
        (
            f"{MANAGER}test_a_full_disk_is_reported_with_numbers",
            f"{MANAGER}test_a_disk_too_small_is_seen_before_the_first_byte",
            f"{MANAGER}test_saves_may_fail_behind_training_until_too_many_have",
        ),
    ),
    Row(
        5,
        "the disk is full at the manifest, at `latest`, at a log",
        "nothing half is committed; training goes on with one warning",
        (
            f"{MANAGER}test_a_full_disk_is_reported_with_numbers",
            "train/test_log.py::test_a_full_disk_costs_one_warning",
            "checkpoint/test_starts.py::test_a_full_disk_never_stops_a_run",
        ),
    ),
    Row(6, "fsync fails", "that save is never committed", (f"{MANAGER}test_a_failed_fsync_is_never_committed",)),
    Row(
        7,
        "a limit of the file size or a quota",
        "as a full disk",
        (f"{MANAGER}test_a_full_disk_is_reported_with_numbers",),
    ),
    Row(
        8,
        "the checkpoint folder cannot be written, or is a file",
        "refused before anything is built, status 2",
        (
            f"{MANAGER}test_a_folder_that_cannot_be_written_is_refused_at_the_start",
            "faults/test_bad_input.py::test_a_wrong_setting",
        ),
    ),
    Row(
        9,
        "one rank cannot save, the others can",
        "no commit anywhere; all know which rank, and why",
        (f"{MANAGER}test_one_failing_rank_stops_the_save_on_all_and_is_named",),
    ),
    Row(
        10,
        "the thread that saves fails or stands still",
        "a failure is told and made good by the next save; a stuck call is told every minute with file and rank; "
        "no step has two writers",
        (
            f"{MANAGER}test_a_call_that_is_stuck*",
            f"{MANAGER}test_a_save_that_lasts_is_told_every_minute",
            f"{MANAGER}test_async_save_keeps_one_snapshot*",
            f"{MANAGER}test_a_failed_background_save*",
            "faults/test_ways_out.py::test_the_wait_for_a_save_ends",
        ),
    ),
    Row(
        11,
        "two jobs on one checkpoint folder",
        "the second is refused and names the first; a dead job's lock is taken",
        (
            f"{MANAGER}test_a_second_job_is_refused*",
            f"{MANAGER}test_the_lock_of_a_killed*",
            f"{MANAGER}test_a_lock_of_another_machine*",
            f"{MANAGER}test_a_job_whose_folder*",
            f"{LOCK}*",
        ),
    ),
    Row(
        12,
        "a kill while old checkpoints are deleted",
        "the newest good one stays; what is half deleted goes",
        (
            f"{CRASHES}test_killed_at_every_call_of_a_save",
            f"{MANAGER}test_retention",
            f"{MANAGER}test_damaged_and_unfinished_folders_are_not_counted",
        ),
    ),
    Row(
        13,
        "a step is saved that has a folder already",
        "a new folder is put in its place, never written over",
        (
            f"{MANAGER}test_a_step_done_again*",
            f"{MANAGER}test_going_back_replaces*",
            f"{CRASHES}test_killed_at_every_call_of_a_save",
        ),
    ),
    # ---- loading ----
    Row(
        14,
        "one bit of a file is flipped",
        "found before it is used; file and block are named; the step before is taken",
        (
            f"{DAMAGE}test_every_flipped_bit*",
            f"{DAMAGE}test_no_byte_of_a_damaged_block*",
            "faults/test_bad_input.py::test_a_damaged_checkpoint_falls_back_and_says_so",
        ),
    ),
    Row(15, "files are cut, empty, or end in zeros", "the same", (f"{DAMAGE}test_truncated_missing_and_zeroed_files",)),
    Row(
        16,
        "a shard or the manifest is missing or unreadable",
        "the same, and what is missing is listed",
        (
            f"{DAMAGE}test_truncated_missing_and_zeroed_files",
            f"{DAMAGE}test_a_whole_foreign_manifest*",
            "checkpoint/test_unreadable.py",
        ),
    ),
    Row(
        17,
        "a file of another rank or step, whole by itself",
        "refused",
        (f"{DAMAGE}test_a_file_in_another_ones_place",),
    ),
    Row(
        18,
        "`latest` is empty, nonsense, or points elsewhere",
        "the folders decide; it is a hint",
        (f"{DAMAGE}test_hint_file_is_only_a_hint",),
    ),
    Row(
        19,
        "all checkpoints are damaged",
        "the start ends, with a list; never random weights unless asked for",
        (
            f"{DAMAGE}test_no_usable_checkpoint_never*",
            f"{DAMAGE}test_damage_found_while_reading_in_all*",
            "faults/test_bad_input.py::test_when_all_checkpoints*",
        ),
    ),
    Row(
        20,
        "a pickle that would run code",
        "refused, and does not run",
        ("convert/test_reshard_errors.py::test_a_hostile_pickle*", "checkpoint/test_hostile.py"),
    ),
    Row(
        21,
        "the layout changes between two starts",
        "state is bitwise the same after loading; in fp64 the run follows one that never changed",
        (
            "checkpoint/test_layouts.py::test_saved_in_one_layout_and_loaded_in_every",
            f"{LOOP}test_every_layout_writes_the_same_bytes_and_continues_any_other",
        ),
    ),
    Row(
        22,
        "architecture, vocabulary or tokenizer differ from the checkpoint's",
        "refused, key by key",
        (
            f"{DAMAGE}test_another_architecture*",
            f"{DAMAGE}test_another_tokenizer*",
            "faults/test_bad_input.py::test_another_model*",
        ),
    ),
    Row(
        23,
        "a checkpoint of a newer or older format",
        "newer ones are refused and not touched; older ones are read",
        (
            f"{DAMAGE}test_a_newer_format*",
            "checkpoint/test_layouts.py::test_headers_do_not_change*",
            "config/test_load.py::test_checkpoints_of_earlier_versions*",
        ),
    ),
    Row(
        24,
        "ranks see different newest checkpoints",
        "they agree on one, or say who does not see what",
        (
            f"{DAMAGE}test_what_some_ranks_do_not_see*",
            f"{DAMAGE}test_checkpoints_that_only_other_ranks*",
            f"{DAMAGE}test_damage_seen_by_one_rank*",
        ),
    ),
    # ---- going on exactly ----
    Row(
        25,
        "a run is stopped and goes on",
        "bitwise as if it had not, in six layouts",
        (f"{LOOP}test_resuming_changes_no_bit", f"{WATCH}test_resuming_with_skip*"),
    ),
    Row(
        26,
        "several stops; a stop in a ramp, at an evaluation, after the last step",
        "the same; a finished run ends at once with 0",
        (
            f"{LOOP}test_resuming_changes_no_bit",
            f"{LOOP}test_ramp_up*",
            "train/test_stops.py",
            "faults/test_bad_input.py::test_a_finished_run*",
        ),
    ),
    Row(
        27,
        "the order of samples under kills",
        "every sample once, in order",
        (f"{REPLACEMENT}test_a_killed_and_a_frozen*", "data/test_loader.py::test_batches_of_every_step*"),
    ),
    Row(
        28,
        "the size of dp changes",
        "the order of samples does not",
        (f"{LOOP}test_ramp_up*", "data/test_mixture.py::test_the_order_is_the_same*"),
    ),
    Row(
        29,
        "data or weights of a mixture changed since the checkpoint",
        "refused, and what to write is said",
        (
            "train/test_data.py::test_changed_weights_or_files*",
            "data/test_mixture.py::test_weights_edited*",
            "data/test_mixture.py::test_files_that_were_replaced*",
        ),
    ),
    # ---- processes ----
    Row(
        30,
        "a rank is killed in a step",
        "named at once; replaced in place, or all leave; the result is bitwise the same",
        (
            f"{SUPERVISOR}test_a_killed_rank*",
            f"{REPLACEMENT}test_a_killed_and_a_frozen*",
            f"{REPLACEMENT}test_without_copies*",
            f"{REPLACEMENT}test_who_makes*",
            "comm/test_shared_memory.py::test_a_rank_that_leaves*",
        ),
    ),
    Row(
        31,
        "segmentation fault, abort, no memory",
        "rank and signal are named, out of memory where the kernel counts it",
        (f"{SUPERVISOR}test_a_killed_rank*", "recovery/test_node.py::test_kills_for_want_of_memory"),
    ),
    Row(
        32,
        "an exception on one rank",
        "that rank is named first; its traceback is on the screen",
        (f"{SUPERVISOR}test_an_exception*", "comm/test_world.py::test_first_failure*"),
    ),
    Row(
        33,
        "a rank leaves with status 0 too early",
        "a failure like any: it left, and did not say why",
        (f"{SUPERVISOR}test_a_rank_that_ends_as_if*",),
    ),
    Row(
        34,
        "a rank stands still",
        "named with step, phase and communication, stacks of all; replaced, or all leave with 4",
        (
            f"{SUPERVISOR}test_a_frozen_rank*",
            f"{SUPERVISOR}test_a_rank_that_holds*",
            "recovery/test_doctor.py",
            f"{REPLACEMENT}test_a_killed_and_a_frozen*",
        ),
    ),
    Row(
        35,
        "ranks do not agree about a communication",
        "who left one out, or is in another, is named",
        (
            f"{SUPERVISOR}test_a_rank_that_leaves_a_collective_out*",
            "comm/test_shared_memory.py::test_operations_of*",
            "comm/test_threads.py::test_different_calls*",
        ),
    ),
    Row(
        36,
        "the thread that loads data dies or is stuck",
        "an error within the time-out that says where it is",
        (
            "data/test_loader.py::test_a_stuck_thread*",
            "data/test_loader.py::test_what_would_end_the_thread*",
            "data/test_loader.py::test_an_exception_in_the_thread*",
        ),
    ),
    Row(
        37,
        "a rank is missing, or there twice; the port is taken; addresses or sizes differ",
        "every rank ends within the time-out and knows which rank, port or size",
        (
            "comm/test_rendezvous.py",
            "comm/test_world.py::test_a_rank_that_never*",
            "comm/test_world.py::test_wrong_number*",
            f"{RANKS}test_a_second_run*",
            "faults/test_hosts.py::test_a_name_that_does_not*",
        ),
    ),
    Row(
        38,
        "the launcher is killed",
        "its ranks save and stop with 75; no process is left",
        (f"{SUPERVISOR}test_a_killed_launcher*",),
    ),
    Row(
        39,
        "one rank is slower than those with the same work",
        "it is named with its factor; noise names nobody",
        (
            f"{SUPERVISOR}test_a_slow_rank*",
            "recovery/test_doctor.py::test_a_slow_rank*",
            "recovery/test_doctor.py::test_noise*",
        ),
    ),
    Row(
        40,
        "a link between hosts is cut",
        "both sides end and name the host, whatever they do; a slow disk is waited for",
        (
            "faults/test_hosts.py::test_a_host_that_is_cut_off*",
            "faults/test_hosts.py::test_a_slow_disk*",
            "recovery/test_generations.py::test_a_host_is_lost*",
            "faults/test_hosts.py::test_a_link*",
            "faults/test_hosts.py::test_supervisors*",
            "faults/test_hosts.py::test_a_host_that_is_gone*",
        ),
    ),
    Row(
        41,
        "it fails at every start",
        "after three starts without a step the next one refuses and says when each was",
        (
            "checkpoint/test_starts.py",
            "train/test_starts.py",
            "faults/test_restarts.py",
            f"{REPLACEMENT}test_a_fault_that_comes_again*",
        ),
    ),
    # ---- signals and launchers ----
    Row(
        42,
        "SIGTERM to the launcher or to one rank",
        "one save that all agree on, status 75, no step is lost",
        (f"{LOOP}test_a_signal_to_one_rank*", f"{SUPERVISOR}test_signals_reach*", "train/test_signals.py"),
    ),
    Row(
        43,
        "SIGUSR1 or SIGUSR2 ahead of a limit",
        "saved, and requeued by the Slurm script",
        (
            "test_examples.py::test_sbatch_requeues*",
            f"{SUPERVISOR}test_signals_reach*",
            "train/test_signals.py::test_usr_signals*",
        ),
    ),
    Row(
        44,
        "a signal while starting, evaluating, saving; a second one; a storm of them",
        "no deadlock and no half save; the second SIGTERM ends at once",
        (
            f"{RANKS}test_a_signal_to_one_rank_before*",
            f"{RANKS}test_a_storm*",
            "train/test_stops.py::test_an_evaluation*",
            "train/test_signals.py::test_a_second_request*",
            f"{REPLACEMENT}test_a_request_to_stop*",
        ),
    ),
    Row(
        45,
        "the time to save is over in the middle of a save",
        "the checkpoint before is taken",
        (f"{CRASHES}test_killed_at_every_call_of_a_save",),
    ),
    Row(46, "Slurm preempts and requeues a job", "it goes on where it was", ("test_examples.py::test_smoke*",)),
    Row(
        47,
        "another number of ranks after a requeue",
        "laid out anew",
        (f"{LOOP}test_every_layout_writes*", "checkpoint/test_layouts.py::test_saved_in_one_layout*"),
    ),
    Row(
        48,
        "a rank of mpirun dies",
        "all are gone within seconds, and the rank is named",
        ("faults/test_mpirun.py",),
    ),
    # ---- numbers ----
    Row(
        49,
        "one gradient of one rank is not finite",
        "no rank applies that step; it is counted",
        (f"{LOOP}test_a_step_that_is_not_finite*", "train/test_health.py::test_one_rank_decides*"),
    ),
    Row(
        50,
        "the loss is not finite many times in a row",
        "the run ends, names the last good step, and has kept it",
        (
            f"{LOOP}test_too_many_bad_steps*",
            "train/test_health.py::test_bad*",
            "faults/test_ways_out.py::test_no_save*",
            f"{MANAGER}test_a_state_that_is_not_finite*",
        ),
    ),
    Row(
        51,
        "a spike of loss or gradient norm",
        "named with its documents; skipped or rolled back where asked",
        (
            f"{WATCH}test_a_spike*",
            f"{WATCH}test_a_skipped_spike*",
            f"{WATCH}test_a_run_goes_back*",
            f"{WATCH}test_noise*",
        ),
    ),
    Row(
        52,
        "a bit of a weight of one dp rank flips and stays",
        "tensor, rank and host are named; status 5",
        (
            f"{WATCH}test_a_bit_that_stays*",
            "optim/test_replicas.py::test_a_bit_of_a_weight*",
            "optim/test_replicas.py::test_a_digest_knows*",
        ),
    ),
    Row(
        53,
        "the same in a norm weight that tp ranks share",
        "the same; of two copies both are named",
        ("optim/test_replicas.py::test_norms*", "optim/test_replicas.py::test_shared_heads*"),
    ),
    Row(
        54,
        "a bit of the optimizer's state flips",
        "found between the beginning of a save and its writing, and not saved; between two saves it is not found",
        ("checkpoint/test_state_bits.py", "checkpoint/test_memory.py::test_of_a_thousand*"),
    ),
    Row(
        55,
        "a gradient is wrong once",
        "named where it is off by much; of ordinary size only a replay finds it",
        (f"{WATCH}test_a_gradient_wrong*", "recovery/test_replay.py"),
    ),
    # ---- data and configuration ----
    Row(
        56,
        "bad records in the text",
        "each is named with file and line, skipped up to a limit; no other document changes",
        (
            "text/test_documents.py::test_planted*",
            "text/test_preprocess.py::test_a_bad_record*",
            "text/test_preprocess.py::test_too_many*",
            "text/test_preprocess.py::test_strict*",
            "text/test_losses.py",
        ),
    ),
    Row(
        57,
        "a kill while text is tokenized",
        "the next start writes the same bytes",
        ("text/test_resume.py::test_killed*",),
    ),
    Row(
        58,
        "tokenized files are cut, damaged, or hold impossible ids",
        "found at opening, or by the block that is read",
        (
            "data/test_indexed.py::test_a_damaged_index*",
            "data/test_indexed.py::test_a_truncated*",
            "data/test_blocks.py::test_any_flipped*",
            "data/test_sources.py::test_an_id_outside*",
        ),
    ),
    Row(
        59,
        "a data file is cut while a run reads it",
        "a clear error after a save of the last good step, no SIGBUS",
        (
            "train/test_data.py::test_a_file_truncated*",
            "data/test_indexed.py::test_truncation_while*",
            "data/test_loader.py::test_a_file_truncated*",
        ),
    ),
    Row(
        60,
        "an index cache is cut, or made by two jobs",
        "there is none: samples are computed, not stored",
        ("data/test_samples.py::test_a_sample_depends*", "data/test_indexed.py::test_ten_million*"),
    ),
    Row(
        61,
        "less data than asked for",
        "epochs are told, or it is refused with the size that would fit",
        ("data/test_sources.py::test_missing_truncated_and_small*", "train/test_data.py::test_a_cap_on_epochs"),
    ),
    Row(
        62,
        "a wrong configuration",
        "refused at once, all problems together, each with value and rule; status 2",
        (
            "config/test_rules.py",
            "config/test_load.py::test_message",
            "config/test_load.py::test_all_problems*",
            "faults/test_bad_input.py::test_all_errors*",
            f"{RANKS}test_a_mistake*",
        ),
    ),
    Row(
        63,
        "the disk of the logs is full; TensorBoard is missing; a line was cut by a kill",
        "training goes on; the cut line is mended by the next start",
        (
            "train/test_log.py::test_a_full_disk*",
            "train/test_metrics.py::test_a_full_disk*",
            "train/test_metrics.py::test_a_missing_package*",
            "train/test_metrics.py::test_a_line_in_the_middle*",
        ),
    ),
    Row(
        64,
        "a GPU or a kernel package that is asked for is not there, or raises",
        "one line says why; another is taken only where that was allowed",
        (
            "comm/test_world.py::test_cuda_asked*",
            "kernels/test_select.py::test_any_exception*",
            "kernels/test_select.py::test_missing_packages*",
        ),
    ),
)
