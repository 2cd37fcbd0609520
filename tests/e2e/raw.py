"""The services without the client library's help: for requests that it would never send."""

import contextlib

import grpc
import numpy as np
import pytest
from lamina.regions import map_region
from lamina.v1 import config_service_pb2 as cpb
from lamina.v1 import config_service_pb2_grpc, layer_service_pb2_grpc, session_service_pb2_grpc
from lamina.v1 import layer_service_pb2 as lpb
from lamina.v1 import session_service_pb2 as spb
from lamina.v1 import tensor_pb2 as tpb

CONFIG = dict(batch_size=2, max_seq_length=8, hidden_size=16, heads=2, num_hidden_layers=2, seed=7)
SHAPE = (2, 8, 16)
BYTES = 2 * 8 * 16 * 4


@contextlib.contextmanager
def refused(code, *words):
    """The call inside answers this status, with these words in its message, and no capability in it."""
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    assert caught.value.code() == grpc.StatusCode[code], caught.value.details()
    for word in words:
        assert word in caught.value.details(), caught.value.details()


class Raw:
    def __init__(self, target):
        self.channel = grpc.insecure_channel(target, options=[("grpc.max_receive_message_length", -1),
                                                              ("grpc.max_send_message_length", -1)])
        self.config = config_service_pb2_grpc.ConfigServiceStub(self.channel)
        self.layer = layer_service_pb2_grpc.LayerServiceStub(self.channel)
        self.sessions = session_service_pb2_grpc.SessionServiceStub(self.channel)
        self.stacks = []
        opened = self.sessions.CreateSession(spb.CreateSessionRequest(client_name="raw"))
        self.session, self.broker, self.lease = opened.session_id, opened.broker_path, opened.lease_seconds
        self.sequence = 0

    def close(self):
        for name in self.stacks:
            with contextlib.suppress(grpc.RpcError):
                self.config.DeleteStack(cpb.DeleteStackRequest(name=name))
        with contextlib.suppress(grpc.RpcError):
            self.sessions.DeleteSession(spb.DeleteSessionRequest(session_id=self.session))
        self.channel.close()

    def stack(self, name="s", **changes):
        created = self.config.CreateStack(cpb.CreateStackRequest(name=name, config=cpb.StackConfig(**{**CONFIG, **changes})))
        self.stacks.append(name)
        return created.stack

    def describe(self, name="s"):
        return self.config.GetStack(cpb.GetStackRequest(name=name)).stack

    def region(self, size=1 << 16, session=None):
        return self.sessions.CreateRegion(
            spb.CreateRegionRequest(session_id=session or self.session, size_bytes=size)).region

    def mapped(self, region, session=None):
        return map_region(self.broker, session or self.session, region.region_id)

    def next(self):
        return tpb.Mutation(session_id=self.session, sequence=self.sequence + 1)

    def took(self):
        """The last mutation was applied."""
        self.sequence += 1

    @staticmethod
    def tensor(values, dtype=tpb.DATA_TYPE_FLOAT32):
        values = np.ascontiguousarray(values)
        return tpb.Tensor(dtype=dtype, shape=values.shape, inline_data=values.tobytes())

    @staticmethod
    def slice(region, offset=0, size=BYTES, shape=SHAPE, dtype=tpb.DATA_TYPE_FLOAT32):
        return tpb.Tensor(dtype=dtype, shape=shape,
                          slice=tpb.Slice(region_id=region.region_id, offset_bytes=offset, size_bytes=size))

    def forward_request(self, training=True, **fields):
        request = lpb.ForwardRequest(stack="s", session_id=self.session, training=training)
        if training:
            request.mutation.CopyFrom(self.next())
        if "input" not in fields:
            request.input.CopyFrom(self.tensor(np.ones(SHAPE, np.float32)))
        for name, value in fields.items():
            getattr(request, name).CopyFrom(value) if hasattr(value, "CopyFrom") else setattr(request, name, value)
        return request

    def forward(self, **fields):
        answer = self.layer.Forward(self.forward_request(**fields))
        if fields.get("training", True):
            self.took()
        return answer

    def backward_request(self, context, **fields):
        request = lpb.BackwardRequest(stack="s", mutation=self.next(), context_id=context)
        request.output_grad.CopyFrom(self.tensor(np.ones(SHAPE, np.float32)))
        for name, value in fields.items():
            getattr(request, name).CopyFrom(value) if hasattr(value, "CopyFrom") else setattr(request, name, value)
        return request

    def backward(self, context, **fields):
        answer = self.layer.Backward(self.backward_request(context, **fields))
        self.took()
        return answer

    def apply(self, **fields):
        answer = self.layer.ApplyGradients(
            lpb.ApplyGradientsRequest(stack="s", mutation=self.next(), **{"learning_rate": 0.01, **fields}))
        self.took()
        return answer

    def gradients(self):
        answer = self.config.GetGradients(cpb.GetGradientsRequest(stack="s"))
        return {t.name: np.frombuffer(t.tensor.inline_data, np.float32) for t in answer.tensors}

    def parameters(self):
        answer = self.config.GetParameters(cpb.GetParametersRequest(stack="s"))
        return {t.name: np.frombuffer(t.tensor.inline_data, np.float32) for t in answer.tensors}
