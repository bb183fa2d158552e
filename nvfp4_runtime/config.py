"""Frozen configurations, resolved once from flags, model files and machine facts. Torch-free; dtypes are strings."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Dtype = Literal["bfloat16", "float16", "float32"]
Numerics = Literal["w4a16", "w4a4", "w4a8"]
HeadDtype = Literal["auto", "bf16", "fp8", "nvfp4"]
KVDtype = Literal["bfloat16", "float32", "fp8", "nvfp4"]
ModelImpl = Literal["auto", "native", "transformers"]
DeviceName = Literal["auto", "cpu", "cuda"]


@dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, variant and the variant's numbers, as in transformers' `rope_parameters`.

    partial_rotary_factor      share of a head that turns; "proportional": of its pairs, and the others turn by nothing
    short_factor, long_factor  "longrope": what each wave is stretched by, in contexts up to the original one and beyond
    query_beta                 turned queries are multiplied by 1 + query_beta * ln(1 + floor(position / original));
                               0: they are not
    """

    theta: float = 10000.0
    kind: Literal["default", "linear", "llama3", "yarn", "longrope", "proportional"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    partial_rotary_factor: float = 1.0
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_beta: float = 0.0


@dataclass(frozen=True)
class Gate:
    """What a gated feed-forward makes of its two projections.

    silu       silu(gate) * up
    gelu_tanh  gelu(gate) * up, by the approximation with tanh
    clamped    gate at most `limit`, up between -limit and limit; gate * sigmoid(alpha * gate) * (up + 1)
    """

    form: Literal["silu", "gelu_tanh", "clamped"] = "silu"
    alpha: float = 0.0
    limit: float = 0.0


SILU = Gate()


@dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of a layer's feed-forward.

    scoring             how the router's logits become scores: softmax over all experts, or each expert's sigmoid
    correction_bias     scores are chosen by score + bias; the bias does not weigh the experts' results
    num_groups          experts in equal groups; only those of the `top_groups` best groups can be chosen, a group being
                        as good as its two best experts
    renormalise         chosen scores are divided by their sum; then all are multiplied by `scale`
    shared_size         intermediate size of the expert that every token passes, 0: none
    shared_gate         its result is multiplied by the sigmoid of one more projection of the input
    gated               experts have gate and up, which `gate` joins; else relu(up)^2
    biases              router and experts have them
    latent_size         width into which experts' input is projected before and from which after them, 0: none
    layers[i]           whether layer i has the mixture or a plain feed-forward
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    layers: tuple[bool, ...]
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    correction_bias: bool = False
    num_groups: int = 1
    top_groups: int = 1
    renormalise: bool = True
    scale: float = 1.0
    shared_size: int = 0
    shared_gate: bool = False
    gated: bool = True
    latent_size: int = 0
    gate: Gate = SILU
    biases: bool = False


@dataclass(frozen=True)
class MLAConfig:
    """Multi-head latent attention: keys and values of all heads come from one short vector per token.

    q_lora_rank      width between the two projections of the queries; None: one projection
    kv_lora_rank     width of the latent vector, which is what the cache keeps
    nope_dim, rope_dim, v_dim  per head: queries and keys without rope, with rope (one key for all heads), values
    interleaved      rope turns neighbours (x0, x1), (x2, x3), ... instead of halves
    scale            of the scores, YaRN's correction included
    """

    q_lora_rank: int | None
    kv_lora_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    interleaved: bool
    scale: float


@dataclass(frozen=True)
class Mamba2Config:
    """A Mamba-2 mixer: num_heads of head_dim, B and C shared by the heads of each of num_groups, state_size wide.

    conv_width  of the causal convolution over x, B and C
    min_step    steps (after softplus) are no smaller
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_width: int
    min_step: float

    @property
    def inner(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def conv_dim(self) -> int:
        return self.inner + 2 * self.num_groups * self.state_size


@dataclass(frozen=True)
class DeltaConfig:
    """A gated delta net in place of a layer's attention: value heads share the keys and queries of fewer key heads.

    layers[i]   whether layer i has it
    conv_width  of the causal convolution over queries, keys and values
    joined      the files hold two projections whose rows go key head by key head (Qwen3-Next); else four plain ones
    """

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    conv_width: int
    layers: tuple[bool, ...]
    joined: bool

    @property
    def keys(self) -> int:
        return self.num_key_heads * self.key_dim

    @property
    def values(self) -> int:
        return self.num_value_heads * self.value_dim


@dataclass(frozen=True)
class Gemma4Layer:
    """Heads of one of Gemma 4's layers; key_is_value: there is no projection to values, keys serve."""

    num_kv_heads: int
    head_dim: int
    windowed: bool
    key_is_value: bool


@dataclass(frozen=True)
class NASLayer:
    """What a search left of one Llama layer.

    num_kv_heads       0: no attention
    intermediate_size  0: no feed-forward
    linear_attention, linear_ffn  one square projection stands in its place
    """

    num_kv_heads: int
    intermediate_size: int
    linear_attention: bool = False
    linear_ffn: bool = False
    window: int | None = None


Block = Literal["mamba", "attention", "mlp", "moe"]


@dataclass(frozen=True)
class ModelConfig:
    """What a decoder's code needs to know of its config.json, in one spelling.

    layer_windows[i]  layer i's sliding window in tokens, or None for full attention
    num_draft_layers  follow the last layer in the files: they predict further tokens (multi-token prediction), unread
    nas[i]            what a search left of layer i; empty: all layers are alike
    blocks[i]         what layer i is where layers are one thing each; empty: attention and feed-forward in each
    sinks             each head of attention has one more score, without a value
    fused             the files hold q, k and v as one matrix, gate and up as another
    local_rope        of layers with a window, where it differs from `rope`
    attention_scale   of the scores; None: head_dim ** -0.5
    gate              of the plain feed-forward
    zero_centred      the files hold norms' weights less 1
    delta             gated delta nets in some layers
    gemma4[i]         heads of layer i where layers differ in them (Gemma 4)
    final_softcap     logits are pulled into plus or minus this; 0: they are not
    qk_norm           each head of queries and keys is normed
    whole_qk_norm     all of a token's queries are normed as one, and all its keys
    root, head        where decoder and head lie in the files
    vision_class      the class whose language model this is; "": there is no more than the language model
    """

    architecture: str
    model_type: str
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    whole_qk_norm: bool = False
    layer_windows: tuple[int | None, ...] = ()
    dtype: Dtype = "bfloat16"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    moe: MoEConfig | None = None
    mla: MLAConfig | None = None
    num_draft_layers: int = 0
    mamba: Mamba2Config | None = None
    blocks: tuple[Block, ...] = ()
    nas: tuple[NASLayer, ...] = ()
    sinks: bool = False
    fused: bool = False
    local_rope: RopeConfig | None = None
    attention_scale: float | None = None
    gate: Gate = SILU
    zero_centred: bool = False
    delta: DeltaConfig | None = None
    gemma4: tuple[Gemma4Layer, ...] = ()
    final_softcap: float = 0.0
    root: str = "model"
    head: str = "lm_head"
    vision_class: str = ""

    @property
    def rotary_dim(self) -> int:
        """How many of a head's dimensions rope turns; the rest pass as they are."""
        return self.mla.rope_dim if self.mla is not None else int(self.head_dim * self.rope.partial_rotary_factor)


@dataclass(frozen=True)
class QuantConfig:
    """What config.json and hf_quant_config.json declare. The tensors decide; this is checked against them.

    method       "none", "modelopt", "compressed-tensors", "fp8" (DeepSeek), "mxfp4" (gpt-oss), or one without a reader
    algo         upper-case algorithm in ModelOpt's words, e.g. "NVFP4", or None for a plain checkpoint
    kv_algo      "FP8", "NVFP4" or None
    exclude      patterns on module paths that stay unquantised: exact, fnmatch, or regular after "re:"
    layers       (target, algorithm) pairs of a mixed checkpoint: module or container paths, "re:" patterns, class names
    unsupported  what is declared and changes the arithmetic in ways no code here follows; such a checkpoint is refused
    """

    method: str = "none"
    algo: str | None = None
    group_size: int = 16
    kv_algo: str | None = None
    exclude: tuple[str, ...] = ()
    producer: str = ""
    notes: tuple[str, ...] = ()
    layers: tuple[tuple[str, str], ...] = ()
    unsupported: tuple[str, ...] = ()


@dataclass(frozen=True)
class CacheConfig:
    """The paged KV cache. `num_blocks` None: as many as fit into `memory_bytes` (None: a share of free memory).

    gpu_memory_utilization  the share of a GPU's whole memory this process may use, weights and all; the cache gets what
                            the rest leaves of it. Says nothing on a CPU
    """

    block_size: int = 16
    num_blocks: int | None = None
    memory_bytes: int | None = None
    kv_dtype: KVDtype | Literal["auto"] = "auto"
    enable_prefix_caching: bool = True
    gpu_memory_utilization: float = 0.9


@dataclass(frozen=True)
class SchedulerConfig:
    """Bounds of one step and of the queue."""

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int | None = None
    max_queued_requests: int = 1024
    max_queued_tokens: int = 1 << 20


FaultKind = Literal["exception", "nan", "memory", "hang", "death"]


@dataclass(frozen=True)
class SimulatedFault:
    """What goes wrong in the simulated engine, and when: in its `step`-th step, or with a `prompt` that holds these
    tokens.

    exception, memory  the step raises
    nan                logits are not numbers
    hang               the step does not return
    death              the process is killed
    """

    kind: FaultKind
    step: int | None = None
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class SimulatedConfig:
    """The deterministic stand-in for a model: scripted tokens and a step time, no weights, no torch.

    Request r's token i is `script[i % len(script)]` if a script is given, else a hash of the tokens so far.
    """

    vocab_size: int = 256
    max_model_len: int = 4096
    script: tuple[int, ...] = ()
    eos_token_id: int | None = None
    step_seconds: float = 0.0
    faults: tuple[SimulatedFault, ...] = ()


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA adapter to load beside the model: the name that requests choose it by, and its local folder."""

    name: str
    path: str


@dataclass(frozen=True)
class EngineConfig:
    """Everything the engine process is told. `model` is a local folder; `simulated` replaces it.

    lm_head_dtype  "auto": as the checkpoint stores it; "fp8", "nvfp4": a plain head is quantised at load, for speed
    model_impl     "native": ours; "transformers": that library's module on our kernels; "auto": ours if there is one
    device         "auto": a GPU if PyTorch can use one, else the CPU
    self_test      kernels are compared with the reference, and a sanity prompt is run, before the engine is ready
    max_lora_rank  adapters of a higher rank are refused
    cuda_graphs    on a GPU, steps that only decode are replayed as one launch
    machine_limits "off", "measure" (once, kept in the cache) or "GB/s,GFLOP/s": what steps are compared with
    log_format     "text" or "json": how the engine's process writes its log
    """

    model: str = ""
    dtype: Dtype | Literal["auto"] = "auto"
    numerics: Numerics | Literal["auto"] = "auto"
    lm_head_dtype: HeadDtype = "auto"
    model_impl: ModelImpl = "auto"
    device: DeviceName = "auto"
    backend: str = "auto"
    cuda_graphs: bool = True
    self_test: bool = False
    machine_limits: str = "off"
    log_format: str = "text"
    threads: int | None = None
    seed: int = 0
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    simulated: SimulatedConfig | None = None
    adapters: tuple[AdapterConfig, ...] = ()
    max_lora_rank: int = 64
