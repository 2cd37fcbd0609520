"""A gRPC server in front of a daemon that passes calls on and loses some."""

import collections
import concurrent.futures

import grpc


class LosingProxy(grpc.GenericRpcHandler):
    """with LosingProxy(daemon.target) as p: a client of p.target reaches the daemon, but each call of LayerService has
    to be made three times: the first time the daemon runs it and its answer is lost, the second time the call itself
    is. The client hears UNAVAILABLE both times.

    stay_lost: a method all of whose answers are lost. lost: how many answers of each method were.
    """

    def __init__(self, daemon, stay_lost=None):
        self.stay_lost = stay_lost
        self.lost = collections.Counter()
        self._tries = collections.Counter()
        self._channel = grpc.insecure_channel(daemon)
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(16), handlers=[self])
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"

    def __enter__(self):
        self._server.start()
        return self

    def __exit__(self, *_):
        self._server.stop(None).wait()
        self._channel.close()

    def service(self, details):
        method = details.method
        if method.endswith("/KeepAlive"):
            return grpc.stream_stream_rpc_method_handler(lambda messages, context: self._stream(method, messages, context))
        return grpc.unary_unary_rpc_method_handler(lambda request, context: self._call(method, request, context))

    def _stream(self, method, messages, context):
        answers = self._channel.stream_stream(method)(messages)
        context.add_callback(answers.cancel)
        try:
            yield from answers
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())

    def _call(self, method, request, context):
        name = method.rpartition("/")[2]
        losing = "LayerService" in method
        # Requests of one call are equal: that is what repeating it means.
        self._tries[method, request] += 1
        tries = self._tries[method, request]
        if losing and tries == 2 and name != self.stay_lost:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the call was lost")
        try:
            answer = self._channel.unary_unary(method)(request)
        except grpc.RpcError as error:
            context.abort(error.code(), error.details())
        if losing and (tries == 1 or name == self.stay_lost):
            self.lost[name] += 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "the answer was lost")
        return answer
