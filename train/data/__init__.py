"""Fine-tuning data: jsonl files in, packed batches of token ids out. Not the loss, not the training step.

The surface that a trainer uses, each name imported from its own file:

    from train.data.config import DataConfig
    from train.data.pipeline import open_data
    from train.data.preferences import open_pairs

    config = DataConfig(instruct_data="chats.jsonl:3,more/:1")
    batches = open_data(config, tokenizer, seq_len=8192, batch_size=16, seed=0, process_index=0, process_count=1)
    batch = next(batches)          # train.data.batches.Batch, numpy
    state = batches.state()        # a small JSON document: store it with the checkpoint
    batches.restore(state)         # the next batch is the one that followed, on any number of hosts
    batches.counts                 # samples, tokens, trained tokens, fill rate, lines left out

`batch_size` counts the rows of the global batch, and a host gets its share of them, rows `process_index * b` up to
`(process_index + 1) * b` of `b = batch_size / process_count`. Every host reads all the data and packs all the rows,
so the global batches and the state are the same on every host and for every number of hosts. Where a mesh gives a
host other rows than that share, open the data with the defaults of both (one process) and cut the global batch.

Evaluation is the same call with `config.for_evaluation()`: unshuffled, one pass, and the last batch is filled up
with empty rows of weight 0. `epochs=N` ends likewise; without epochs there is always a next batch.

A trainer's YAML file gives both configs: `data_configs(its data section)` of run_file.py.

Preference pairs come from `open_pairs`, which takes the same arguments and gives two rows for each pair.

The files: config.py (options), run_file.py (options from YAML), formats.py and messages.py (what a line may say),
samples.py, tokens.py and call_ids.py (ids, and which of them are trained), sources.py (files and lines), packing.py and
batches.py (rows and arrays), order.py (which line comes when; the one place that needs Grain), pipeline.py (all of it
in a row), preferences.py (pairs), report.py (what `ministral data validate` finds), reshape.py (foreign formats).
"""
