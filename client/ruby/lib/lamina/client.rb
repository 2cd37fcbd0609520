require "grpc"
require "lamina/v1/config_service_services_pb"
require "lamina/v1/layer_service_services_pb"
require "lamina/v1/session_service_services_pb"
require "lamina/security"
require "lamina/session"

module Lamina
  # LAMINA_TARGET, or the socket where laminad listens by default.
  def self.default_target
    target = ENV["LAMINA_TARGET"].to_s
    return target unless target.empty?
    return "unix:/run/lamina/laminad.sock" if Process.euid.zero?
    folder = ENV["XDG_RUNTIME_DIR"].to_s
    folder.empty? ? "unix:/tmp/lamina-#{Process.euid}/laminad.sock" : "unix:#{folder}/lamina/laminad.sock"
  end

  # The id by which the daemon's log calls the call that ended with this GRPC::BadStatus; nil where the daemon never heard
  # of it. Where the daemon did not let the caller in, the id is in the message instead.
  def self.request_id(error)
    (error.metadata || {})["x-request-id"]
  end

  # A connection to one daemon. Threads: any.
  class Client
    CALL_TIMEOUT = 60 # seconds of one attempt of a call

    # The generated stubs of the daemon's three services.
    attr_reader :config, :layers, :sessions

    # Yields a client of the daemon at target, "unix:PATH" or "HOST:PORT", and closes it. security: of TCP targets.
    def self.open(target = Lamina.default_target, security = Security.from_environment)
      client = new(target, security)
      yield client
    ensure
      client&.close
    end

    # Nothing is sent yet: whether a daemon is there shows with the first call.
    def initialize(target = Lamina.default_target, security = Security.from_environment)
      security = Security.new if target.start_with?("unix:")
      # The daemon's inline cap says how large a message may be; gRPC's own 4 MiB would be below it.
      options = { "grpc.max_receive_message_length" => -1, "grpc.max_send_message_length" => -1 }
      options["grpc.ssl_target_name_override"] = security.server_name if security.server_name
      interceptors = []
      if security.token_file
        unless security.tls? || target.match?(/\A(localhost|127(\.\d+){3}|\[::1\]):/)
          raise ArgumentError, "the token would cross the network to #{target} unencrypted; set ca or tls"
        end
        security.authorization # says at once what is wrong with the file
        interceptors << TokenInterceptor.new(security)
      end
      @channel = GRPC::Core::Channel.new(target, options, security.credentials)
      @config = V1::ConfigService::Stub.new(nil, nil, channel_override: @channel, interceptors: interceptors)
      @layers = V1::LayerService::Stub.new(nil, nil, channel_override: @channel, interceptors: interceptors)
      @sessions = V1::SessionService::Stub.new(nil, nil, channel_override: @channel, interceptors: interceptors)
    end

    # Ends the connection, and with it the client's sessions.
    def close
      @channel.close
    end

    # Frees a stack with its weights and contexts. It needs no session. GRPC::NotFound.
    def delete_stack(name)
      @config.delete_stack(V1::DeleteStackRequest.new(name: name), deadline: Time.now + CALL_TIMEOUT)
    end

    # Yields a Session and ends it; the arguments are Session.new's.
    def session(**options)
      session = Session.new(self, **options)
      yield session
    ensure
      session&.close
    end
  end
end
