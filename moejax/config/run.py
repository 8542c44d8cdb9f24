"""What a training run is: its data, its optimizer, its steps. Knows no jax."""

from typing import Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from moejax.config.fields import FORBID_UNKNOWN, Count, NonNegative, Positive
from moejax.config.mesh import MeshConfig
from moejax.config.model import ModelConfig

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class DataConfig:
    """Where text comes from and how it becomes tokens."""

    source: str = "stdlib-prose"
    """stdlib-prose (the interpreter's own documentation, about 2 MB), stdlib-code (its sources, about 12 MB),
    or a path or glob of .txt, .jsonl or .parquet files"""
    text_field: str = "text"
    """the column or key that holds the text of a .jsonl or .parquet row"""
    format: Literal["text", "chat"] = "text"
    """chat: .jsonl rows of messages, rendered by the model's chat template; the loss counts the assistant's answers"""
    objective: Literal["next_token", "span_corruption"] = "next_token"
    """span_corruption: an encoder reads the text with spans cut out, the decoder writes them (T5, arXiv 1910.10683)"""
    messages_field: str = "messages"
    """chat: the key that holds a row's list of {"role", "content"}"""
    chat_template: str = ""
    """chat: the path of a .jinja file; empty: the one beside tokenizer.json, or ours for bpe and bytes"""
    tokenizer: str = "bpe"
    """bpe: trained on the corpus at model.vocab; bytes: one token a byte; or the path of a tokenizer.json"""
    val_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.05
    """part of the files (of the rows, where there is one file) held out for validation"""
    prefetch: Count = 2
    """batches prepared ahead of the device"""

    def __post_init__(self) -> None:
        if self.objective == "span_corruption" and self.format == "chat":
            raise ValueError('objective = "span_corruption" cuts up plain text: set format = "text"')


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) under a warm-up and decay schedule, with global-norm clipping."""

    lr: Positive = 1e-3
    """peak learning rate"""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """decay after warm-up; wsd: warm-up, stable, linear decay (arXiv 2404.06395)"""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """linear warm-up from zero"""
    decay_fraction: Fraction = 0.2
    """wsd: the last part of the steps that decays"""
    final_lr_fraction: Fraction = 0.1
    """learning rate at the end, as a part of the peak"""
    beta1: Fraction = 0.9
    """decay of the first moment"""
    beta2: Fraction = 0.95
    """decay of the second moment"""
    eps: Positive = 1e-8
    """added to the root of the second moment"""
    weight_decay: NonNegative = 0.1
    """on matrices alone: norms, biases and the router's are left out"""
    clip_norm: Positive = 1.0
    """global gradient norm above which gradients are scaled down"""


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class TrainConfig:
    """The loop: how long, how large a batch, how often to look and to save."""

    steps: Count = 300
    """optimizer steps"""
    global_batch: Count = 16
    """sequences per optimizer step, over all devices"""
    seq_len: Count = 256
    """tokens per sequence"""
    source_len: Count | None = None
    """tokens of the source that an encoder reads beside each sequence; none: seq_len"""
    microbatches: Count = 1
    """gradient accumulation: parts of the global batch run one after the other"""
    seed: int = 0
    """weights, data order, dropout and router noise"""
    log_every: Count = 10
    """steps between log lines"""
    eval_every: Annotated[int, Field(ge=0)] = 100
    """steps between validations; 0: only at the end"""
    eval_batches: Count = 8
    """batches per validation"""
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    """steps between checkpoints; 0: only at the end"""
    keep_last: Count = 2
    """newest checkpoints kept, beside the best by validation loss"""
    max_bad_steps: Count = 10
    """non-finite steps in a row after which the run stops"""
    init_from: str = ""
    """a Hugging Face folder whose weights training starts from (--model FOLDER sets it); empty: drawn ones"""
    tensorboard: bool = False
    """also write TensorBoard event files (needs the tensorboard extra)"""

    def __post_init__(self) -> None:
        if self.global_batch % self.microbatches:
            raise ValueError(f"global_batch ({self.global_batch}) must divide by microbatches ({self.microbatches})")

    def num_source(self) -> int:
        """Give the tokens of a source."""
        return self.seq_len if self.source_len is None else self.source_len


@dataclass(frozen=True, config=FORBID_UNKNOWN)
class RunConfig:
    """Everything that defines a run; saved beside it as config.toml."""

    model: ModelConfig = ModelConfig()
    """the model"""
    mesh: MeshConfig = MeshConfig()
    """the mesh"""
    train: TrainConfig = TrainConfig()
    """the loop"""
    optimizer: OptimizerConfig = OptimizerConfig()
    """the optimizer"""
    data: DataConfig = DataConfig()
    """the data"""
