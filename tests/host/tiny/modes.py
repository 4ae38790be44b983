"""MODELs in the states that a small GPU, several GPUs or a compiler put them into."""

import json
import time
from types import SimpleNamespace

import comfy.patcher_extension
from comfy_api.latest import io
from comfy_api.torch_helpers import set_torch_compile_wrapper

from .probes import _output_path, _recording

_Wrappers = comfy.patcher_extension.WrappersMP


class LowMemoryModel(io.ComfyNode):
    """While it samples, every layer that can be is offloaded, its patches added on the fly."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="LowMemoryModel",
            category="ssr tests",
            inputs=[io.Model.Input("model")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model):
        def offload(executor, patcher, *args, **kwargs):
            result = executor(patcher, *args, **kwargs)
            assert patcher.partially_unload(patcher.offload_device, 1e12) > 0
            return result

        small = model.clone()
        small.add_wrapper_with_key(_Wrappers.PREPARE_SAMPLING, "low memory", offload)
        return io.NodeOutput(small)


class CompiledModel(io.ComfyNode):
    """TorchCompileModel with a backend that only traces and guards."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="CompiledModel",
            category="ssr tests",
            inputs=[io.Model.Input("model"), io.String.Input("backend", default="eager")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, backend):
        compiled = model.clone(disable_dynamic=True)
        guards = {"guard_filter_fn": lambda entries: ["transformer_options" not in e.name for e in entries]}
        set_torch_compile_wrapper(model=compiled, backend=backend, options=guards)
        return io.NodeOutput(compiled)


class RecordPasses(io.ComfyNode):
    """Like RecordInputs, but numbers its samplings: prefix_0, prefix_1 ..."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="RecordPasses",
            category="ssr tests",
            inputs=[io.Model.Input("model"), io.String.Input("prefix")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, prefix):
        count = 0

        def record(executor, *args, **kwargs):
            nonlocal count
            name, count = f"{prefix}_{count}", count + 1
            with _recording(executor.class_obj.model_patcher.model, name):
                return executor(*args, **kwargs)

        recorded = model.clone()
        recorded.add_wrapper_with_key(_Wrappers.OUTER_SAMPLE, "record_passes", record)
        return io.NodeOutput(recorded)


class TimeSteps(io.ComfyNode):
    """Passes a MODEL through; its next sampling writes the CPU seconds of every model call."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="TimeSteps",
            category="ssr tests",
            inputs=[io.Model.Input("model"), io.String.Input("prefix")],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def execute(cls, model, prefix):
        seconds = []

        def call(executor, *args, **kwargs):
            start = time.thread_time()
            try:
                return executor(*args, **kwargs)
            finally:
                seconds.append(time.thread_time() - start)

        def sampling(executor, *args, **kwargs):
            try:
                return executor(*args, **kwargs)
            finally:
                _output_path(prefix).with_suffix(".json").write_text(json.dumps(seconds))

        timed = model.clone()
        timed.add_wrapper_with_key(_Wrappers.APPLY_MODEL, "time_steps", call)
        timed.add_wrapper_with_key(_Wrappers.OUTER_SAMPLE, "time_steps", sampling)
        return io.NodeOutput(timed)


class SecondDevice(io.ComfyNode):
    """Runs the sampling wrappers of a MODEL as if a second GPU held another copy; counts the hooks of both."""

    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="SecondDevice",
            category="ssr tests",
            is_output_node=True,
            inputs=[io.Model.Input("model"), io.Model.Input("copy")],
        )

    @classmethod
    def execute(cls, model, copy):
        assert model.model is not copy.model
        both = model.clone()
        both.set_additional_models("multigpu", [copy])
        wrappers = [w for group in both.wrappers[_Wrappers.OUTER_SAMPLE].values() for w in group]
        guider = SimpleNamespace(model_patcher=both)

        def hooks():
            return [sum(len(m._forward_hooks) for m in one.model.modules()) for one in (both, copy)]

        executor = comfy.patcher_extension.WrapperExecutor.new_class_executor(hooks, guider, wrappers)
        return io.NodeOutput(ui={"text": [json.dumps({"inside": executor.execute(), "after": hooks()})]})


MODE_NODES = [LowMemoryModel, CompiledModel, RecordPasses, SecondDevice, TimeSteps]
