module Lamina
  # How a client over TCP knows its daemon, and how the daemon knows the client. Over a Unix socket nothing of it is used:
  # there the daemon knows callers by their users. tls: whether there is TLS at all, as any file of it implies; ca,
  # certificate, key: files in PEM, read by Client.new; server_name: in the daemon's certificate, where it is not the
  # target's host; token_file: holds a bearer token and nothing else, read at each call.
  Security = Struct.new(:tls, :ca, :certificate, :key, :server_name, :token_file, keyword_init: true) do
    # What LAMINA_TLS, LAMINA_TLS_CA, LAMINA_CLIENT_CERT, LAMINA_CLIENT_KEY, LAMINA_TLS_SERVER_NAME and LAMINA_TOKEN_FILE say.
    def self.from_environment
      set = ->(name) { ENV[name] unless ENV[name].to_s.empty? }
      new(tls: !["", "0"].include?(ENV["LAMINA_TLS"].to_s), ca: set["LAMINA_TLS_CA"],
          certificate: set["LAMINA_CLIENT_CERT"], key: set["LAMINA_CLIENT_KEY"],
          server_name: set["LAMINA_TLS_SERVER_NAME"], token_file: set["LAMINA_TOKEN_FILE"])
    end

    def tls?
      tls || ca || certificate || key || server_name ? true : false
    end

    # What GRPC::Core::Channel.new takes.
    def credentials
      return :this_channel_is_insecure unless tls?
      read = ->(path) { path && File.binread(path) }
      GRPC::Core::ChannelCredentials.new(read[ca], read[key], read[certificate])
    end

    # For the metadata of each call.
    def authorization
      words = File.read(token_file).split
      raise ArgumentError, "#{token_file} must hold one token and nothing else" unless words.length == 1
      "Bearer #{words[0]}"
    end
  end

  # Shows the token with every call.
  class TokenInterceptor < GRPC::ClientInterceptor
    def initialize(security)
      super({})
      @security = security
    end

    %i[request_response client_streamer server_streamer bidi_streamer].each do |kind|
      define_method(kind) do |metadata: nil, **, &call|
        metadata["authorization"] = @security.authorization
        call.call
      end
    end
  end
end
