"""What vLLM is told of a plan by the names of its own arguments: by the host that measures it, and by who serves it."""

from collections.abc import Mapping, Sequence

from pipetune.bench.files import cache_root
from pipetune.bench.spec import SMOLLM2, SMOLLM2_HUB_ID, ModelSpec, Plan, device_index, device_kind

Arguments = dict[str, str | int | float | bool]


def vllm_arguments(model: ModelSpec, plan: Plan, *, max_model_len: int, device_bytes: Mapping[str, int]) -> Arguments:
    """Arguments of a plan's engines beside the model and the split, for requests of `max_model_len` tokens at most;
    what is left to vLLM is missing. `device_bytes` has the memory of all devices, of which caps are shares."""
    assert plan.engine is not None
    found: Arguments = plan.engine.model_dump(exclude={"name", "served"}, exclude_none=True)
    if plan.engine.kv_cache_memory_bytes is None:
        # On CPUs a worker's share is of all the memory that devices share.
        of = sum(device_bytes.values()) if device_kind(plan.devices[0]) == "cpu" else None
        sizes = ((stage, device_bytes[stage.device]) for stage in plan.stages)
        found["gpu_memory_utilization"] = round(min(stage.cap_bytes(size) / (of or size) for stage, size in sizes), 4)
    return found | {"dtype": model.dtype, "trust_remote_code": model.trust_remote_code, "max_model_len": max_model_len}


def cores_of_workers(plan: Plan, devices: Sequence[str], cores: Sequence[int], each: int) -> str:
    """`VLLM_CPU_OMP_THREADS_BIND`: cores of every worker of a replica, `each` device having so many, in order."""
    firsts = [devices.index(one) * each for own in plan.devices for one in plan.shards(own)]
    return "|".join(",".join(str(cores[(first + place) % len(cores)]) for place in range(each)) for first in firsts)


def gpus_of(plan: Plan, visible: str | None = None) -> str:
    """`CUDA_VISIBLE_DEVICES` of a plan's engines, by rank; `visible` is this process's own, which devices count in."""
    indices = [device_index(one) for device in plan.devices for one in plan.shards(device)]
    names = visible.split(",") if visible else list(map(str, range(1 + max(indices))))
    return ",".join(names[index] for index in indices)


def model_to_serve(model: ModelSpec) -> str:
    """Folder or id that vLLM loads the model by; of our own alias the folder that was measured, if it still is."""
    folder = cache_root() / "models" / f"{SMOLLM2}-{model.revision}"
    return model.name if model.name != SMOLLM2 else str(folder) if folder.is_dir() else SMOLLM2_HUB_ID
