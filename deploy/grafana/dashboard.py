"""The Grafana dashboard, as code: prints the JSON that is committed beside it as laminad.json.

    build/deploy-tools/bin/python deploy/grafana/dashboard.py > deploy/grafana/laminad.json

deploy/validate fails where the two differ. Rows answer, in this order: does it serve, how fast, where does a step's time
go, who waits, what goes wrong, what fills the memory, what does the GPU say. Every query narrows to the daemons that
the variables `job` and `instance` pick.
"""

import itertools

from grafana_foundation_sdk.builders import common, dashboard, prometheus, stat, table, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
OURS = 'job=~"$job", instance=~"$instance"'
TRAINING = 'direction=~"forward_training|backward"'
ARENAS = 'kind="activations"'
NOT_OK = 'grpc_code!="OK"'
# Codes that speak of the daemon or its load; the others speak of what a client asked for.
FAULTS = 'grpc_code=~"UNKNOWN|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL|UNAVAILABLE|DATA_LOSS"'


def series(metric, *matchers):
    return f"{metric}{{{', '.join([OURS, *matchers])}}}"


def rate(metric, *matchers):
    return f"rate({series(metric, *matchers)}[$__rate_interval])"


def quantile(q, metric, by, *matchers):
    labels = ", ".join(["le", *by])
    return f"histogram_quantile({q}, sum by ({labels}) ({rate(metric + '_bucket', *matchers)}))"


def mean(metric, by, *matchers):
    """Of a histogram's observations; NaN where there were none."""
    labels = ", ".join(by)
    return (f"sum by ({labels}) ({rate(metric + '_sum', *matchers)})"
            f" / sum by ({labels}) ({rate(metric + '_count', *matchers)})")


def on_our_gpus(dcgm):
    """A series of dcgm-exporter's for each daemon on that GPU: both name it by its UUID."""
    return f"max by (UUID) ({dcgm}) * on (UUID) group_right () {series('lamina_device_info')}"


def with_targets(panel, queries, instant=False):
    for number, (expression, legend) in enumerate(queries):
        target = prometheus.Dataquery().expr(expression).legend_format(legend).ref_id(chr(ord("A") + number))
        panel = panel.with_target(target.instant() if instant else target.range())
    return panel


def graph(title, text, unit, *queries, span=8, stack=False, top=None):
    """A panel over time. `queries`: (expression, legend); `top`: the axis ends there at most by itself."""
    panel = (timeseries.Panel().title(title).description(text).unit(unit).datasource(SOURCE).span(span).height(8)
             .min(0).line_width(1).fill_opacity(20 if stack else 0).show_points(common_models.VisibilityMode.NEVER)
             .legend(common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.TABLE)
                     .placement(common_models.LegendPlacement.BOTTOM).calcs(["lastNotNull", "max"]).show_legend(True))
             .tooltip(common.VizTooltipOptions().mode(common_models.TooltipDisplayMode.MULTI)
                      .sort(common_models.SortOrder.DESCENDING)))
    if stack:
        panel = panel.stacking(common.StackingConfig().mode(common_models.StackingMode.NORMAL))
    if top is not None:
        panel = panel.axis_soft_max(top)
    return with_targets(panel, queries)


def number(title, text, unit, expression, *steps, span=3):
    """One number. `steps`: (from, colour), the first from None."""
    thresholds = dashboard.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(
        [models.Threshold(value=value, color=color) for value, color in steps or [(None, "text")]])
    panel = (stat.Panel().title(title).description(text).unit(unit).datasource(SOURCE).span(span).height(4)
             .thresholds(thresholds)
             .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"])))
    return with_targets(panel, [(expression, "")])


def rows():
    yield "Health", [
        number("Serving", "Daemons that take calls", "short", f"sum({series('lamina_serving')})",
               (None, "red"), (1, "green")),
        number("Not serving", "Scraped, but draining or with a failed device", "short",
               f"count({series('lamina_serving')} == 0) or vector(0)", (None, "green"), (1, "red")),
        number("Down", "Targets that Prometheus cannot scrape", "short",
               f"count({series('up')} == 0) or vector(0)", (None, "green"), (1, "red")),
        number("Uptime, least", "Since the start of the youngest daemon", "s",
               f"time() - max({series('process_start_time_seconds')})", (None, "text")),
        number("Stacks", "On all daemons", "short", f"sum({series('lamina_stacks')})"),
        number("Sessions", "Clients' leases", "short", f"sum({series('lamina_sessions')})"),
        number("Checkpoint age, oldest", "Since the last save, or the start where there was none", "s",
               f"max({series('lamina_checkpoint_age_seconds')} and {series('lamina_checkpoints_enabled')} == 1)"
               f" or max(0 * {series('lamina_checkpoints_enabled')})",
               (None, "green"), (3600, "yellow"), (7200, "red")),
        number("MFU", "Of the last training steps: achieved FLOP/s over the device's peak in the stack's dtype",
               "percentunit", f"avg({series('lamina_mfu_ratio', TRAINING)})"),
        with_targets(
            table.Panel().title("Builds").description("Version, commit and device of each daemon").datasource(SOURCE)
            .span(12).height(7),
            [(f"count by (instance, version, commit, backend, device) ({series('lamina_build_info')})", "")],
            instant=True),
        graph("Serving, by daemon", "1: takes calls; 0: drains, or its device failed", "short",
              (series("lamina_serving"), "{{instance}}"), span=12, top=1),
    ]
    yield "Throughput", [
        graph("Steps", "Done, by direction", "ops",
              (f"sum by (direction) ({rate('lamina_steps_total')})", "{{direction}}")),
        graph("Samples", "Sequences, by direction", "ops",
              (f"sum by (direction) ({rate('lamina_samples_total')})", "{{direction}}")),
        graph("Tokens, real and padding", "What padding takes is work for nothing: pack the batches", "ops",
              (f"sum by (kind) ({rate('lamina_tokens_total', TRAINING)})", "{{kind}}"), stack=True),
        graph("FLOP/s", "Of the model's products over wall time (all), and while the last step computed", "flops",
              (f"sum({rate('lamina_flops_total')})", "over wall time"),
              (series("lamina_achieved_flops_per_second"), "{{instance}} {{direction}}, computing")),
        graph("MFU", "Achieved FLOP/s of the last step over the device's peak in the stack's dtype", "percentunit",
              (series("lamina_mfu_ratio"), "{{instance}} {{direction}}"), top=1),
        graph("Tensors, by transport", "What goes inline could go through a region, without a copy", "Bps",
              (f"sum by (transport, role) ({rate('lamina_tensor_bytes_total')})", "{{transport}} {{role}}"),
              stack=True),
    ]
    step = "lamina_step_duration_seconds"
    yield "Latency", [
        graph("Step time", "From admission to result", "s",
              *((quantile(q, step, ["direction"], 'phase="total"'), f"{{{{direction}}}} p{q * 100:.0f}")
                for q in (0.5, 0.99))),
        graph("Where a training step's time goes", "Means of a Forward's and a Backward's phases, added up", "s",
              (mean(step, ["phase"], TRAINING, 'phase!="total"'), "{{phase}}"), stack=True),
        graph("Step time by daemon, mean", "One that is slower than its like", "s",
              (mean(step, ["instance", "direction"], 'phase="total"'), "{{instance}} {{direction}}")),
        graph("RPC time p99", "On the server, by method", "s",
              (quantile(0.99, "grpc_server_handling_seconds", ["grpc_method"], 'grpc_type="unary"'), "{{grpc_method}}"),
              span=12),
        graph("Checkpoint time, mean", "Save: to the disk's confirmation", "s",
              (mean("lamina_checkpoint_duration_seconds", ["op"]), "{{op}}"), span=12),
    ]
    yield "Queue", [
        graph("Calls that wait for the device", "", "short", (series("lamina_queue_depth"), "{{instance}}")),
        graph("Wait for the device p99", "", "s",
              (quantile(0.99, step, ["direction"], 'phase="queue"'), "{{direction}}")),
        graph("Calls turned away", "With nothing changed, by reason", "ops",
              (f"sum by (reason) ({rate('lamina_admission_rejections_total')})", "{{reason}}")),
        graph("RPCs under way", "Begun and not ended; KeepAlive and Execute streams last as long as their clients",
              "short",
              (f"sum by (grpc_method) ({series('grpc_server_started_total')})"
               f" - sum by (grpc_method) ({series('grpc_server_handled_total')})", "{{grpc_method}}"), span=12),
        graph("RPCs", "Begun, by method", "ops",
              (f"sum by (grpc_method) ({rate('grpc_server_started_total')})", "{{grpc_method}}"), span=12),
    ]
    yield "Errors", [
        graph("RPCs that failed", "By code", "ops",
              (f"sum by (grpc_code) ({rate('grpc_server_handled_total', NOT_OK)})", "{{grpc_code}}")),
        graph("Share of faults", "RPCs that ended with a code that speaks of the daemon or its load, not of the request",
              "percentunit",
              (f"(sum by (instance) ({rate('grpc_server_handled_total', FAULTS)})"
               f" or 0 * sum by (instance) ({rate('grpc_server_handled_total')}))"
               f" / sum by (instance) ({rate('grpc_server_handled_total')})", "{{instance}}"), top=0.05),
        graph("Sessions that ended", "By reason", "ops",
              (f"sum by (reason) ({rate('lamina_sessions_ended_total')})", "{{reason}}")),
        graph("Sessions adrift", "Their KeepAlive stream broke; they wait to be resumed", "short",
              (series("lamina_sessions_adrift"), "{{instance}}"), span=6),
        graph("Optimizer steps skipped", "A gradient was not finite", "ops",
              (f"sum by (instance) ({rate('lamina_skipped_steps_total')})", "{{instance}}"), span=6),
        graph("Gradient norm", "L2, unscaled, before clipping, of the last optimizer step", "short",
              (series("lamina_gradient_norm"), "{{instance}}"), span=6),
        graph("Loss scale", "After the last optimizer step", "short", (series("lamina_loss_scale"), "{{instance}}"),
              span=6),
        graph("Checkpoints that failed", "", "ops",
              (f"sum by (op) ({rate('lamina_checkpoint_failures_total')})", "{{op}}"), span=12),
        graph("Loss scale changes", "Growth after clean steps, backoff after overflows", "ops",
              (f"sum by (change) ({rate('lamina_loss_scale_changes_total')})", "{{change}}"), span=12),
    ]
    yield "Memory", [
        graph("Device memory of the stacks", "The plan: what is planned is what is allocated", "bytes",
              (f"sum by (kind) ({series('lamina_device_memory_bytes')})", "{{kind}}"), stack=True),
        graph("Device memory", "Of the device, for all its processes", "bytes",
              (series("lamina_device_memory_capacity_bytes"), "{{instance}} there is"),
              (series("lamina_device_memory_free_bytes"), "{{instance}} free")),
        graph("Activations", "Of the context arenas: what outstanding contexts take, and the most they ever took",
              "bytes",
              (f"sum({series('lamina_device_memory_bytes', ARENAS)})", "arenas"),
              (f"sum({series('lamina_activation_bytes_in_use')})", "in use"),
              (f"sum({series('lamina_activation_bytes_high_water')})", "high water")),
        graph("Contexts", "Forwards that wait for their Backward; a floor that never sinks is a leak", "short",
              (series("lamina_contexts"), "{{instance}}")),
        graph("The sessions that hold the most", "Largest first; /statusz names them", "bytes",
              (f"sum by (instance, rank, kind) ({series('lamina_session_memory_bytes')})",
               "{{instance}} {{rank}} {{kind}}"), stack=True),
        graph("Regions", "Memory that is shared with clients", "bytes",
              (series("lamina_region_bytes"), "{{instance}}")),
        graph("The process", "Resident host memory", "bytes",
              (series("process_resident_memory_bytes"), "{{instance}}"), span=12),
        graph("Last checkpoint", "Size", "bytes", (series("lamina_checkpoint_bytes"), "{{instance}}"), span=12),
    ]
    yield "GPU", [
        graph("Busy", "Share of time with a kernel on it", "percent",
              (on_our_gpus("DCGM_FI_DEV_GPU_UTIL"), "{{instance}}"), top=100),
        graph("Tensor cores", "Share of cycles in which they work", "percentunit",
              (on_our_gpus("DCGM_FI_PROF_PIPE_TENSOR_ACTIVE"), "{{instance}}"), top=1),
        graph("Memory bandwidth", "Share of cycles in which it moves data", "percentunit",
              (on_our_gpus("DCGM_FI_PROF_DRAM_ACTIVE"), "{{instance}}"), top=1),
        graph("Memory in use", "By all processes", "decmbytes",
              (on_our_gpus("DCGM_FI_DEV_FB_USED"), "{{instance}}")),
        graph("Power", "", "watt", (on_our_gpus("DCGM_FI_DEV_POWER_USAGE"), "{{instance}}")),
        graph("Temperature", "", "celsius", (on_our_gpus("DCGM_FI_DEV_GPU_TEMP"), "{{instance}}")),
        graph("SM clock", "Falls when power or heat throttles", "rotmhz",
              (on_our_gpus("DCGM_FI_DEV_SM_CLOCK"), "{{instance}}"), span=12),
        graph("XID", "The last error that the driver reported; 0: none", "short",
              (on_our_gpus("DCGM_FI_DEV_XID_ERRORS"), "{{instance}}"), span=12),
    ]


def variables():
    yield dashboard.DatasourceVariable("datasource").label("Prometheus").type("prometheus")
    for name, query in (("job", "label_values(lamina_build_info, job)"),
                        ("instance", 'label_values(lamina_build_info{job=~"$job"}, instance)')):
        yield (dashboard.QueryVariable(name).label(name.capitalize()).datasource(SOURCE).query(query)
               .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).sort(models.VariableSort.ALPHABETICAL_ASC)
               .include_all(True).multi(True).all_value(".+"))


def build():
    board = (dashboard.Dashboard("Lamina").uid("laminad").tags(["lamina"]).editable().refresh("30s").time("now-1h", "now")
             .description("laminad: transformer layer stacks served over gRPC. docs/metrics.md explains each series.")
             .tooltip(models.DashboardCursorSync.CROSSHAIR))
    for variable in variables():
        board = board.with_variable(variable)
    numbers = itertools.count(1)
    for title, panels in rows():
        board = board.with_row(dashboard.Row(title).id(next(numbers)))
        for panel in panels:
            board = board.with_panel(panel.id(next(numbers)))
    return board.build()


if __name__ == "__main__":
    print(JSONEncoder(sort_keys=True, indent=2).encode(build()))
