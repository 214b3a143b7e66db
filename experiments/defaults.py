"""Every setting with its default; each experiment file starts from here and changes what it needs.

A comment that names a dict (`READERS`, `MODELS`, …) says where the words of a setting are defined: add one there.

Both losses reach both shared tables.
"""

import functools
import itertools

import ml_collections

from bdlm_jax.run.controls import CONTROLS


def choose(variants, arg):
    """Returns the settings of one of an experiment's variants, as `--config FILE.py:arg` names it."""
    if arg not in variants:
        raise ValueError(f"the argument {arg!r} is none of {', '.join(variants)}.")
    return variants[arg]


def sweep(key, values):
    """Returns the settings of one key, for `get_hyper`: sweep("seed", (0, 1)) is [{"seed": 0}, {"seed": 1}]."""
    return [{key: value} for value in values]


def product(*sweeps):
    """Returns every combination of the settings of several lists."""
    return [{key: value for one in chosen for key, value in one.items()} for chosen in itertools.product(*sweeps)]


def whole_table(config):
    """Returns every word of the judge's table: baselines, BDLM, and those controls that are not BDLM itself here."""
    models = ("item_pop", "item_knn", "ease", "mf", "lightgcn", "ncf", "sasrec", "itemgcn", "text_lm", "ids_lm", "bdlm")
    settings = {word: control.settings(config) for word, control in CONTROLS.items()}
    if config.mutual.teacher == "lm" and config.mutual.text_head == "none" and not config.mutual.taught.rounds:
        del settings["bdlm_warm_taught"]  # which is bdlm_warm then
    others = [word for word, changes in settings.items() if any(_value(config, k) != v for k, v in changes.items())]
    return (*models, *others, "ids_lm_distilled", "cached", "pool", "pool_alone")


def _value(config, key):
    return functools.reduce(lambda section, name: section[name], key.split("."), config)


def get_config() -> ml_collections.ConfigDict:
    """Returns the defaults: a small BDLM on the embedded twins world. Misspelt keys and other types are refused."""
    c = ml_collections.ConfigDict()
    c.seed = 0
    c.tuned_on = ()  # seeds whose test table was in view when the settings were chosen: pages leave them out
    c.parallel = "jit"  # jit | pmap | mesh
    c.mesh = ml_collections.ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})  # of parallel "mesh"; -1: what is left
    c.models = ("item_pop", "mf", "lightgcn", "text_lm", "ids_lm", "bdlm")  # domain/models.py MODELS, run/contenders.py

    c.data = data = ml_collections.ConfigDict()
    data.kind = "twins"  # twins, or a name of data/readers.py READERS
    data.path = ""
    data.options = ml_collections.ConfigDict()  # arguments of the reader, or of the twins world
    data.min_rating = 0.0
    data.min_user = 0  # k-core
    data.min_item = 0
    data.split = "leave_one_out"  # leave_one_out | global_time | ratio | cold_items (data/splits.py)
    data.validation = 0.1  # share of the interactions, of global_time and ratio
    data.test = 0.1
    data.cold_share = 0.1  # of the items, of cold_items
    data.split_seed = 0  # of ratio and cold_items: runs that differ in `seed` alone split alike
    data.refit = "none"  # none | validation: train once more with that part, as long as was chosen, before the test
    data.titles = "required"  # required | none: whether a language model may train where no item has a text
    data.item_fields = ("title",)
    data.user_fields = ()
    data.candidates = ml_collections.ConfigDict({"cand20": 19, "cand100": 99})
    data.candidates_seed = 0  # of their draw alone: runs that differ in `seed` rank the same candidates

    c.tokenizer = tokenizer = ml_collections.ConfigDict()
    tokenizer.path = ""  # a transformers tokenizer folder, or vocab.json + merges.txt; empty trains one
    tokenizer.vocab_size = 1024

    c.lm = lm = ml_collections.ConfigDict()
    lm.path = ""  # a Hugging Face directory or hub id, whose weights and shape replace the sizes below
    lm.config = ""  # a Hugging Face config.json: that shape, trained from scratch
    lm.trains = "full"  # full | lora | bridge (the decoder frozen); the bridge and the shared tables train in all
    lm.speaks = "trained"  # trained | base: who writes plain text; base, with lora: the model without its adapters
    lm.lora_rank = 8
    lm.lora_alpha = 16.0
    lm.lora_targets = r".*_proj/kernel"  # whole paths in the decoder's tree
    lm.width = 64
    lm.n_layers = 2
    lm.n_heads = 2
    lm.n_kv_heads = 2
    lm.mlp_width = 192
    lm.dropout = 0.2
    lm.dtype = "float32"
    lm.remat = False  # recompute each layer in the backward pass
    lm.remat_keeps = "nothing"  # nothing | dots: what lm.remat does not recompute (products with weights)
    lm.attention = "einsum"  # einsum | xla | cudnn: ours, or of jax.nn.dot_product_attention
    lm.tie_embeddings = True
    lm.learning_rate = 3e-3  # 0: by lm.trains and the LM's width (run/rates.py)
    lm.learning_rate_shared = 3e-3  # of the shared tables, in the scale of the LM's own rows; 0: by that scale
    lm.text_row_rate = 1.0  # share of lm.learning_rate at which the decoder's rows of text tokens move, with full
    lm.weight_decay = 0.01
    lm.clip_norm = 1.0
    lm.warmup_steps = 50
    lm.batch_rows = 16
    lm.softmax_items = 0  # drawn beside a batch's targets for its softmax; 0: all items, 4,096 of over 50,000; -1: all
    lm.max_text_targets = 128  # of a row, drawn anew for every step
    lm.row_std = 0.1  # standard deviation of the <iid> rows as BDLM's LM first reads them; 0: as large as text rows
    lm.optimizer = "adamw"  # of the decoder (mutual/optimizer.py OPTIMIZERS); bridge and tables have adamw
    lm.schedule = "cosine"  # after the warm-up (mutual/optimizer.py SCHEDULES)
    lm.accumulate = 1  # parts in which a batch goes through the decoder, for the memory of one
    lm.param_dtype = "float32"  # float32 | bfloat16: the decoder's weights
    lm.master_weights = True  # with bfloat16: a float32 copy in the optimiser's state takes the steps

    c.pretrain = pretrain = ml_collections.ConfigDict()
    pretrain.corpus = ""  # a text file (.txt, .gz, .xz), one document a line; empty takes the world's corpus
    pretrain.max_tokens = 2_000_000
    pretrain.epochs = 20.0
    pretrain.learning_rate = 3e-3  # 0: the decoder's rate
    pretrain.samples = 512  # texts that a model of lm.path without a corpus writes, to keep its language by; 0: none
    # Rows of general text in the LM's later training, as a share of its histories' rows; with lm.path of all others.
    pretrain.replay_share = 0.1

    c.prompts = prompts = ml_collections.ConfigDict()
    prompts.kind = "ids"  # ids | ids_titles: what the histories of BDLM's LM look like, in training and use
    prompts.titled_share = 0.25  # with kind "ids": further titled windows, as a share of the histories
    prompts.length = 128  # tokens in a row
    prompts.max_items = 100  # history items in a window
    prompts.max_title_tokens = 16
    prompts.user_token = "start"  # start | end | none
    prompts.user_dropout = 0.75  # how often training shows <user> in place of <uid>, to every LM alike
    prompts.read_named = False  # show <uid> when states are read
    # What the LM is asked of an item in words that no item with interactions has, {} its title: "{} means", say; its
    # answer is read on the item's card in the title's place (run/glosses.py). Empty: nothing is asked.
    prompts.gloss = ""
    prompts.chat = "auto"  # auto | always | never: a history within the chat template; auto: of a model named instruct
    prompts.card_copies = 16.0  # text cards of every item in an epoch

    c.shared = shared = ml_collections.ConfigDict()
    shared.width = 64
    shared.std = 0.1
    shared.trained_by = "both"  # both | lm | domain | none
    shared.initial = "domain"  # domain | propagated (its representations) | random: what the tables start from

    c.domain = domain = ml_collections.ConfigDict()
    domain.model = "lightgcn"  # BDLM's domain arm and what it starts from (domain/models.py MODELS)
    domain.options = ml_collections.ConfigDict()  # further arguments of that model
    domain.n_layers = 3
    domain.layer_weights = "uniform"  # uniform | learned
    domain.backend = "auto"  # domain/graph.py BACKENDS
    domain.learning_rate = 5e-3
    domain.regularisation = 1e-4
    domain.batch_size = 4096
    domain.epochs = 40
    domain.popularity = 0.0  # negatives with probability ∝ degree^popularity; 0 is uniform
    domain.evaluate_every = 5
    domain.test_graph = "train+validation"  # train: the edges over which the trained arm propagates at test time

    c.mf = mf = ml_collections.ConfigDict()  # a section with a model's name takes the place of c.domain for it
    mf.std = 0.1  # as shared.std
    mf.learning_rate = 5e-3
    mf.regularisation = 1e-4
    mf.popularity = 0.0  # as domain.popularity
    mf.epochs = 40

    c.sasrec = sasrec = ml_collections.ConfigDict()
    sasrec.length = 50  # items of a window
    sasrec.n_blocks = 2
    sasrec.n_heads = 2
    sasrec.dropout = 0.2
    sasrec.std = 0.02  # as shared.std
    sasrec.learning_rate = 1e-3
    sasrec.schedule = "constant"  # as lm.schedule
    sasrec.warmup_steps = 0
    sasrec.weight_decay = 0.01
    sasrec.batch_size = 128  # windows
    sasrec.epochs = 40
    sasrec.evaluate_every = 2
    sasrec.softmax_items = 0  # as lm.softmax_items

    c.itemgcn = itemgcn = ml_collections.ConfigDict()
    itemgcn.length = 50  # items of a window
    itemgcn.n_layers = 2
    itemgcn.text_neighbours = 5  # others whose texts are most alike that an item is joined to; 0: texts play no part
    itemgcn.dropout = 0.4
    itemgcn.std = 0.02  # as shared.std
    itemgcn.learning_rate = 4e-3
    itemgcn.schedule = "cosine"  # as lm.schedule
    itemgcn.warmup_steps = 100
    itemgcn.weight_decay = 0.01
    itemgcn.batch_size = 256  # windows
    itemgcn.epochs = 20
    itemgcn.evaluate_every = 2
    itemgcn.softmax_items = 0  # as lm.softmax_items

    c.item_knn = ml_collections.ConfigDict({"neighbours": 100, "shrink": 10.0})
    c.ease = ml_collections.ConfigDict({"l2": 250.0})

    c.lm_alone = alone = ml_collections.ConfigDict()  # text_lm and ids_lm
    alone.row_std = 0.02  # as lm.row_std, of ids_lm's own random table
    alone.text_epochs = 12.0
    alone.ids_times = 2.0  # ids_lm's epochs, as a multiple of BDLM's: its rows are fewer, for it reads no titles

    c.mutual = mutual = ml_collections.ConfigDict()
    mutual.reads = "propagated"  # layer0 | propagated: which rows of the domain model the LM reads
    mutual.learning_rate_bridge = 3e-3  # lower where tables are large: their size multiplies what it moves; 0: by it
    mutual.align = "mse"  # mutual/losses.py ALIGN
    mutual.temperature = 1.0
    # none | words | graph: whether likeness of items, by their texts or by the domain model's rows as it was alone,
    # weighs in the LM's scores (lm/text_head.py)
    mutual.text_head = "none"
    mutual.text_width = 128  # dimensions of a text
    # lm | domain | pool: who teaches after the rounds, the LM as it is, the domain model as it was alone, or their sum
    mutual.teacher = "lm"
    mutual.rounds = 3
    mutual.lm_epochs = 11.0  # the first LM phase
    mutual.lm_epochs_a_round = 4.0
    mutual.domain_epochs_a_round = 5
    mutual.domain_learning_rate = 1e-3
    mutual.kl_users = 256  # users a step in the domain arm's score-level term
    mutual.kl_items = 0  # items drawn a step in that term; 0: the whole catalogue
    # Of users the LM hears at the end of a history alone, which is where it is asked: set align_user and kl to 0 where
    # the domain model is much the weaker of the two (experiments/ml1m.py).
    mutual.lm = ml_collections.ConfigDict({"item": 1.0, "text": 0.2, "align_user": 0.1, "align_item": 2.0, "kl": 0.1})
    mutual.domain = ml_collections.ConfigDict({"bpr": 1.0, "align_user": 0.0, "align_item": 1.0, "kl": 5.0})
    # Lessons, after the rounds: the LM and the domain arm learn in turn from the teacher; kl weighs in the LM's loss.
    # lm: goes_on | afresh: it goes on from the rounds, taught at the ends of histories, or begins again, taught at
    # every place of them by the LM as it was and its head (`text_head`; with the teacher "lm", without).
    mutual.taught = ml_collections.ConfigDict(
        {"rounds": 0, "lm_epochs": 5.0, "domain_epochs": 5, "kl": 1.0, "lm": "goes_on"}
    )
    mutual.distill_epochs = 100  # domain epochs against the chosen LM, judged on validation; repeated for test
    mutual.distill_learning_rate = 5e-3

    c.select = "ndcg@10/full"  # the validation metric that chooses each arm's best round; of text_lm with cand20

    c.evaluate = evaluate = ml_collections.ConfigDict()
    evaluate.protocols = ("cand20", "cand100", "full")
    evaluate.text_protocols = ("cand20", "cand100")  # of text_lm, whose cost grows with the candidates
    evaluate.cases = -1  # of a part that are judged, a fixed draw; 0: all; -1: all up to 10^10 scores of a model
    evaluate.validation_users = 10_000  # cases of validation's full ranking at most, a fixed draw; 0: all
    # none | validation | kinds: whether items without a training interaction rank higher by as much as validation
    # chooses, in every model whose scores are inner products alike (run/lifts.py); by the mean over all cases, or
    # (kinds) by that over warm targets and that over cold ones, weighed alike
    evaluate.cold_lift = "none"
    evaluate.chunk = 512
    evaluate.text_history = 8  # titles that text_lm reads

    c.distributed = distributed = ml_collections.ConfigDict()  # several processes, each with this config
    distributed.coordinator = ""  # host:port of process 0; auto asks the cluster; empty is one process
    distributed.processes = 1
    distributed.process = 0

    c.dry_run = dry_run = ml_collections.ConfigDict()  # of the flag --dry_run
    dry_run.n_users = 0  # 0 reads the data
    dry_run.n_items = 0
    dry_run.n_interactions = 0  # of LightGCN's graph; 0 leaves its propagation out where no data are read
    dry_run.devices = 1
    dry_run.device = "h200"  # a100 | h100 | h200 | tpu_v5e | tpu_v5p | tpu_v6e
    dry_run.compile = True  # let XLA compile the step too

    c.runtime = runtime = ml_collections.ConfigDict()
    runtime.checkpoint_seconds = 30.0
    runtime.log = "tensorboard"  # tensorboard (where that extra is installed) | wandb | none: beside metrics.jsonl
    runtime.kept_data = (
        ""  # a folder where what was read is kept, found again by the files' hash; empty: read each time
    )
    runtime.store = ""  # a folder of stages that several runs share (run/store.py); empty: each run has its own
    c.lock()
    for free in (data.options, data.candidates, domain.options):  # whose keys an experiment chooses
        free.unlock()
    return c
