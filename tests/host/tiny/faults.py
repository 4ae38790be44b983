"""A MODEL that fails while it is being sampled."""

import comfy.patcher_extension
import torch
from comfy_api.latest import io

ERRORS = {"out of memory": torch.OutOfMemoryError, "broken": RuntimeError}


class FailingModel(io.ComfyNode):
    """Raises in the model call of the given number, counted over all samplings."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FailingModel",
            category="ssr tests",
            inputs=[
                io.Model.Input("model"),
                io.Int.Input("call", default=2),
                io.Combo.Input("kind", options=list(ERRORS)),
            ],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, call, kind):
        calls = 0

        def fail(executor, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == call:
                raise ERRORS[kind]("planted failure")
            return executor(*args, **kwargs)

        failing = model.clone()
        failing.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.APPLY_MODEL, "failing", fail)
        return io.NodeOutput(failing)


FAULT_NODES = [FailingModel]
