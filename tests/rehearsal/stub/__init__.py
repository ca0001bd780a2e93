"""GPUs that are not there, for processes that start later: `cuda:N` computes on the CPU, NCCL is gloo on threads.

What is real: all of pipetune's control flow, its numbers, the order of messages against waits for the device, a replay
of exactly what was captured, and memory counted tensor by tensor under a cap. What is not: speed, compute that goes on
while the host does, the devices of tensors (`tests.rehearsal.fakes` shows those), kernels.
"""
