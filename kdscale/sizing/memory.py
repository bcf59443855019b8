"""Bytes that a GPU (or CPU process) holds at the peak of a training step, by component.

Letters: P parameters, W ranks, b bytes of a weight (2 in bf16, 4 in fp32), g bytes of a sum of gradients, H hidden,
F ffn, A heads · head_dim, K kv_heads · head_dim, V vocabulary, L layers, S positions a sequence, N = micro-batch · S.

Every formula names its source: *counted* (tensors that autograd saved, or bytes that a process held), *read* (in the
source of DeepSpeed 0.19.8 or of this project), *paper* (ZeRO, arXiv 1910.02054), or *assumed*. Offloaded bytes count
for the host. benchmarks/distill/plan_cluster_check.py compares the sum with measured peaks.
"""

from __future__ import annotations

from kdscale.config.distill.recompute import Recompute
from kdscale.config.distill.settings import EIGHT_BITS
from kdscale.sizing.job import Job, Memory, Setting
from kdscale.sizing.loss_memory import (
    kept_layer_bytes,
    kept_loss_bytes,
    layer_loss_bytes,
    loss_bytes,
    teacher_loss_bytes,
    trained_head,
)
from kdscale.sizing.model_shape import ModelShape
from kdscale.sizing.parallel import job_of_tensor_rank

# DeepSpeed's defaults (read): parameters of a stage-3 student that stay gathered, and those fetched ahead.
MAX_LIVE, PREFETCH = 1_000_000_000, 50_000_000
SUB_GROUP = 1_000_000_000

# Assumed, not measured: CUDA context and NCCL's buffers; fragments of the caching allocator and this model's own error.
CONTEXT_BYTES, MARGIN = 1.5 * (1 << 30), 0.10


def peak_memory(job: Job, setting: Setting) -> Memory:
    """The fullest of five moments: teacher's forward, loss, student's backward and its end, optimiser's step."""
    job = job_of_tensor_rank(job, setting.tensor)
    kept = {
        "student weights": _weights(job, setting),
        "masters and Adam": 0.0 if setting.offload_optimizer else _states(job, setting),
        "weights kept gathered": float(job.item_bytes * min(setting.kept, job.student.params)),
        "teacher": _teacher_weights(job, setting),
        "reference": float(job.item_bytes * job.student.params) if job.reference else 0.0,
        "student's average": 4.0 * job.student.params if job.average and job.item_bytes == 2 else 0.0,
        "validation targets": 0.0 if job.average else _validation(job),
    }
    gradients, bucket = _gradients(job, setting), _bucket(job, setting)
    standing = _standing_gradients(job, setting)
    gathered = _gathered(job, setting)
    head_gradients = job.item_bytes * trained_head(job) * (2 if job.student.tied else 1)
    always = bucket if setting.stage == 3 else 0.0
    forwards = [forward_bytes(job, teacher, setting) for teacher in job.teachers if setting.runs_teacher]
    teacher_forward = max(forwards, default=0.0)
    teacher_loss = teacher_loss_bytes(job, setting) if setting.runs_teacher else 0.0
    ahead = teacher_forward + teacher_loss if setting.overlap else 0.0
    moments = {
        "teacher's forward": {
            "activations": teacher_forward,
            "gathered weights": _teacher_gathered(job, setting),
            "weight of a product": _widened_weight(job) if setting.runs_teacher else 0.0,
            "loss": teacher_loss,
            "gradients": standing,
            "buckets": always,
        },
        "student's loss": {
            "activations": saved_bytes(job, setting),
            "gathered weights": gathered,
            "loss": loss_bytes(job, setting) + layer_loss_bytes(job, setting),
            "gradients": standing,
            "buckets": always,
        },
        "student's backward": {
            "activations": saved_bytes(job, setting) + backward_bytes(job, setting),
            "gathered weights": gathered,
            "loss": kept_loss_bytes(job, setting) + kept_layer_bytes(job, setting),
            "gradients": standing + head_gradients,
            "buckets": bucket,
            "teacher ahead": ahead,
        },
        "end of the backward": {
            "activations": backward_bytes(job, setting),
            "gathered weights": gathered if setting.stage == 3 else 0.0,
            "gradients": gradients,
            "buckets": bucket,
            "teacher ahead": ahead,
        },
        "optimiser's step": {
            "gradients": gradients + (0.0 if setting.offload_optimizer else _step_gradients(job, setting)),
            "buckets": always,
        },
    }
    moment = max(moments, key=lambda name: sum(moments[name].values()))
    components = {**kept, **moments[moment]}
    if job.device == "cuda":
        components["context and margin"] = CONTEXT_BYTES + MARGIN * sum(components.values())
    return Memory({name: size for name, size in components.items() if size}, moment, host_bytes(job, setting))


def host_bytes(job: Job, setting: Setting) -> float:
    """Host memory of what one rank offloads (read).

    Of the optimiser: masters, moments and fp32 gradients, 16 bytes per parameter; at stages 1 and 2 a copy of the
    weights to send back; and the sums of gradients, at stage 3 always, at stages 1 and 2 those in bf16 of several
    micro-batches (fp32 ones stay on the GPU). Then the weights, and of a teacher in host memory one copy per node.
    """
    params, out = job.trained / job.ranks, 0.0
    if setting.offload_optimizer:
        added_here = setting.stage == 3 or (setting.accumulation > 1 and not _widened(job))
        sent_back = job.item_bytes if setting.stage < 3 else 0
        out += params * (16 + sent_back + (job.gradient_bytes if added_here else 0))
    if setting.offload_parameters:
        out += job.weights / job.ranks * job.item_bytes
    if setting.placement == "offloaded":
        out += job.teacher_bytes * job.teacher_params / job.ranks_per_node
    return out


# -- what is always there ----------------------------------------------------------------------------------------------


def _weights(job: Job, setting: Setting) -> float:
    """b·P, or b·P/W at stage 3 (paper); hpZ keeps a second copy, over the ranks of its group (arXiv 2306.10209)."""
    weights = job.item_bytes * job.weights
    if setting.stage < 3:
        return weights
    second = weights / setting.hpz if setting.hpz > 1 else 0.0
    return second + (0.0 if setting.offload_parameters else weights / job.ranks)


def _states(job: Job, setting: Setting) -> float:
    """Adam's moments, 8·P, and an fp32 master, 4·P; over the ranks from stage 1 on (paper).

    In fp32 the weights are the masters at stage 0 and 3, but stage 1 and 2 copy them (read).
    """
    master = 4 if job.item_bytes == 2 or setting.stage in (1, 2) else 0
    return (8 + master) * job.trained / (1 if setting.stage == 0 else job.ranks)


def _teacher_weights(job: Job, setting: Setting) -> float:
    """b·P on every rank, or b·P/W; nothing where it is in host memory or elsewhere. In 8 bits a linear weight has 1."""
    if job.base:
        return 0.0
    weights = float(job.teacher_bytes * job.teacher_params)
    if job.teacher_dtype in EIGHT_BITS:
        weights -= (job.teacher_bytes - 1) * sum(teacher.linears for teacher in job.teachers)
    return {"replicated": weights, "partitioned": weights / job.ranks}.get(setting.placement, 0.0)


def _widened_weight(job: Job) -> float:
    """The largest linear weight of a teacher in int8, which has its dtype for the length of a product (read)."""
    if job.teacher_dtype != "int8":
        return 0.0
    return max(
        job.teacher_bytes * shape.hidden * max(shape.ffn, shape.heads * shape.head_dim) for shape in job.teachers
    )


def _validation(job: Job) -> float:
    """Targets of the held-out text, kept on the device (read in distill/validate.py)."""
    return job.validate_tokens / job.ranks * sum(_target_bytes(job, teacher) for teacher in job.teachers)


def _target_bytes(job: Job, teacher: ModelShape) -> float:
    """Of a token's targets from one teacher: ids, logits, log-sum-exp, or what enters the head; and rows of layers."""
    of_head = teacher.hidden * job.item_bytes if job.top_k is None else job.top_k * 12 + 4
    return of_head + job.layer_losses.teacher_bytes(teacher, job.item_bytes)


# -- gradients and buckets ---------------------------------------------------------------------------------------------


def _widened(job: Job) -> bool:
    """Whether gradients are added in a wider format than the backward makes them in."""
    return job.gradient_bytes > job.item_bytes


def _gradients(job: Job, setting: Setting) -> float:
    """Gradients at the end of the last backward (read).

    Stage 1 keeps its own g·P/W and hands on the rest from the bucket, unless earlier micro-batches of the step have
    left all of them; widened it has all g·P at all times, and offloaded its own share beside them. Stages 2 and 3 hold
    g·P/W; widened stage 2 has b·P/W of the last micro-batch beside it, and does not offload either.
    """
    gradients = job.gradient_bytes * job.trained
    own, widened = gradients / job.ranks, _widened(job)
    if setting.stage == 1 and widened:
        return gradients + (own if setting.offload_optimizer else 0.0)
    if setting.stage == 0 or (setting.stage == 1 and setting.accumulation > 1):
        return gradients
    if setting.stage == 2 and widened:
        return own + job.item_bytes * job.trained / job.ranks
    return 0.0 if setting.offload_optimizer else own


def _standing_gradients(job: Job, setting: Setting) -> float:
    """Gradients of earlier micro-batches while a later one runs; stage 3, and widened 1, always have theirs (read)."""
    gradients = job.gradient_bytes * job.trained
    own, widened = gradients / job.ranks, _widened(job)
    if setting.stage == 3:
        return 0.0 if setting.offload_optimizer else own
    if setting.stage == 1 and widened and not setting.offload_optimizer:
        return gradients
    if setting.accumulation == 1:
        return 0.0
    if setting.stage < 2:
        return gradients
    return 0.0 if setting.offload_optimizer and not widened else own


def _step_gradients(job: Job, setting: Setting) -> float:
    """The optimiser's own gradients: fp32, and at stage 1 and 2 the flattened share beside them (read).

    Where stages 1 and 2 add in fp32, they take a step with the sums themselves.
    """
    params = job.trained / job.ranks
    if setting.stage == 0:
        return 0.0
    if setting.stage == 3:
        return 4 * min(params, SUB_GROUP)
    if _widened(job):
        return 0.0
    return (4 + (job.item_bytes if job.item_bytes == 2 else 0)) * params


def _bucket(job: Job, setting: Setting) -> float:
    """Gradients on their way. A GPU holds the whole buffer, a CPU process only the pages that were written to.

    Stage 3 overlaps: one buffer is filled while another is reduced. Widened stage 1 reduces its sums where they are,
    and widened stage 2 reduces a flattened copy of its bucket, as fp32 (read).
    """
    elements = job.reduce_bucket if job.device == "cuda" else min(job.reduce_bucket, job.trained)
    if setting.stage == 0 and job.ranks == 1:
        return 0.0
    if _widened(job) and setting.stage == 1 and not setting.offload_optimizer:
        return 0.0
    if _widened(job) and setting.stage == 2:
        return float((2 * job.item_bytes + job.gradient_bytes) * elements)
    return float(job.gradient_bytes * elements * (2 if setting.stage == 3 else 1))


# -- weights gathered for a while --------------------------------------------------------------------------------


def _gathered(job: Job, setting: Setting) -> float:
    """Stage 3: weights that the backward will need again soon stay, up to max_live_parameters (read)."""
    if setting.stage < 3 or (job.ranks == 1 and not setting.offload_parameters):
        return 0.0
    return job.item_bytes * min(max(0, job.student.params - setting.kept), MAX_LIVE + PREFETCH)


def _teacher_gathered(job: Job, setting: Setting) -> float:
    """Two layers, one in use while the next is fetched, and the head (read in teacher/placement/weight_stores.py)."""
    if setting.placement not in ("partitioned", "offloaded"):
        return 0.0
    return float(job.teacher_bytes * max(2 * teacher.layer + teacher.head for teacher in job.teachers))


# -- activations -------------------------------------------------------------------------------------------------------


def layer_bytes(job: Job, model: ModelShape) -> float:
    """What autograd saves in one layer, a token (counted on Llama and Qwen3, packed text, exactly).

    The two inputs of products that norms give, 2b·H. Each norm: its input as fp32 and the normalised value, (4 + b)·H,
    both fp32 where the gain is (Gemma), b·H of a centred one, and 4 of its root. Attention: q and its output, 2b·A, k
    and v, 2b·K, and the log-sum-exp, 4 per head; no mask, as documents are kept apart without one. On a CPU the output
    is saved by document and once more joined. A gated ffn: gate, its activation, up, product, 4b·F; others 2b·F.
    Experts: their inputs, sorted, and their outputs.
    """
    b = job.item_bytes
    normed = {("rms", "weight"): 4 + b, ("rms", "one_plus_weight"): 8}.get(model.norm, b)
    norms = 2 * b * model.hidden + model.norms * (normed * model.hidden + 4)
    if model.qk_norm:
        groups = model.heads + model.kv_heads
        norms += normed * groups * model.head_dim + 4 * groups
    outputs = 2 if job.device == "cpu" else 1
    attention = b * ((1 + outputs) * model.attention + 2 * model.kv_heads * model.head_dim) + 4 * model.heads
    experts = 2 * b * model.last_read if model.last_read > model.hidden else 0
    return norms + attention + (4 if model.gated else 2) * b * model.ffn + experts


def kept_bytes(job: Job, model: ModelShape, level: Recompute) -> float:
    """What one layer keeps for the backward, a token, at a level of recompute (counted on Llama and Qwen3, exactly).

    Its input, b·H; of attention the output and the log-sum-exp; of the products q, k, v, the attention's, gate and up,
    and the last where its backward reads that. With soft caps and with flex, attention is not kept.
    """
    b = job.item_bytes
    if not level.checkpoints:
        return layer_bytes(job, model)
    attention = b * model.attention + 4 * model.heads if level.attention else 0
    heads = model.attention + 2 * model.kv_heads * model.head_dim
    ffn = (2 if model.gated else 1) * model.ffn
    products = b * (heads + model.hidden + ffn + model.last_read) if level.products else 0
    return b * model.hidden + attention + products


def recomputed_bytes(job: Job, model: ModelShape, level: Recompute) -> float:
    """What one layer makes again in its backward, a token."""
    return max(0.0, layer_bytes(job, model) - kept_bytes(job, model, level)) if level.checkpoints else 0.0


def saved_bytes(job: Job, setting: Setting) -> float:
    """What waits for the backward: what each layer keeps, and the last norm, rotary positions and ids.

    Adapters keep what their first products give. Inputs that only frozen maps read are not kept; they are counted here.
    """
    tokens, model = setting.rows(job), job.student
    last = (4 + 2 * job.item_bytes) * model.hidden + 3 * job.item_bytes * model.head_dim + 12
    of_adapters = 0 if job.adapters is None or setting.recompute.checkpoints else job.item_bytes * job.adapters.ranks
    return tokens * (kept_bytes(job, model, setting.recompute) * model.layers + of_adapters + last)


def backward_bytes(job: Job, setting: Setting) -> float:
    """Gradients of the activations of one layer, and what of that layer is computed again."""
    tokens, model = setting.rows(job), job.student
    again = recomputed_bytes(job, model, setting.recompute)
    return tokens * (job.item_bytes * 2 * (model.ffn + model.hidden) + again)


def forward_bytes(job: Job, model: ModelShape, setting: Setting) -> float:
    """A forward without gradients at its widest moment.

    Two hidden states, and the largest of three ffn arrays, four arrays of queries with keys and values, and three fp32
    norm arrays.
    """
    tokens, b = setting.rows(job), job.teacher_bytes
    keys_and_values = 2 * model.kv_heads * model.head_dim
    widest = max(3 * b * model.ffn, b * (4 * model.attention + keys_and_values), 12 * model.hidden)
    return tokens * (2 * b * model.hidden + widest)
