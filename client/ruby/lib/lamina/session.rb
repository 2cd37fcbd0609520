require "timeout"
require "lamina/stack"
require "lamina/tensor"

module Lamina
  # This client's lease on the daemon: its regions, contexts and the numbers of its mutations live and die with it.
  # Threads: any; mutations run one after another.
  class Session
    ATTEMPTS = 6 # of a call that is not answered
    FIRST_WAIT = 0.05 # seconds before the second one; then twice as long each time
    FAREWELL = 2 # seconds for ending a session: its lease ends it anyway

    # After these the daemon may have run the call, or not; after every other error it has changed nothing.
    UNANSWERED = [GRPC::Unavailable, GRPC::DeadlineExceeded, GRPC::Cancelled, GRPC::Unknown].freeze

    attr_reader :client, :id, :broker_path

    # "memfd" (tensors lie in regions) or "inline" (they go inside messages), and why the latter.
    attr_reader :transport, :transport_reason

    # name: for people who read the daemon's log, at most 64 printable characters. transport: "memfd" or "inline" to
    # insist, or "auto" for memfd where it works, else inline.
    #
    # GRPC::Unavailable: no daemon, one that drains, or, where memfd is insisted on, no way to its broker socket.
    # GRPC::ResourceExhausted: the daemon's cap on sessions. ArgumentError: the transport.
    def initialize(client, name: "ruby", transport: "auto")
      unless %w[auto memfd inline].include?(transport)
        raise ArgumentError, "transport #{transport.inspect} must be auto, memfd or inline"
      end
      @client = client
      @mutations = Mutex.new # held by the mutation that runs
      @sequence = 0 # of the last mutation that was answered
      @unsure = nil # why nobody knows whether the next one was used; nil: it was not
      @mutex = Mutex.new # guards @over
      @ended = ConditionVariable.new
      @over = nil # why the session is over; nil while it lives
      # A session whose answer was lost ends by itself: nothing holds its lease.
      opened = repeat do |deadline|
        client.sessions.create_session(V1::CreateSessionRequest.new(client_name: name), deadline: deadline)
      end
      @id, @lease, @broker_path = opened.session_id, opened.lease_seconds, opened.broker_path
      hold_lease
      choose_transport(transport)
    end

    # Why the session has ended; nil while it lives. Regions and contexts are gone then, stacks and their weights are
    # the daemon's and still there: open a new session.
    def over
      @mutex.synchronize { @over }
    end

    # Ends the session in the daemon, which frees its contexts and regions. Tensors stay readable. Idempotent.
    def close
      return if over
      @client.sessions.delete_session(V1::DeleteSessionRequest.new(session_id: @id), deadline: Time.now + FAREWELL)
    rescue GRPC::BadStatus
      # The daemon is gone, and the session with it.
    ensure
      finish("closed")
      @keeper.join(FAREWELL)
    end

    # Makes a stack of StackConfig's fields, draws its weights, and returns a Stack. It lives in the daemon until
    # Client#delete_stack, also when this session is over.
    #
    # GRPC::InvalidArgument: the name, or a field, with its value and range. GRPC::AlreadyExists: the name.
    # GRPC::ResourceExhausted: the plan does not fit, with the numbers. ArgumentError: no such field.
    def create_stack(name, **config)
      request = V1::CreateStackRequest.new(name: name, config: V1::StackConfig.new(**config))
      once { |deadline| @client.config.create_stack(request, deadline: deadline) }
      Stack.new(self, name)
    end

    # A Stack that is there. GRPC::NotFound.
    def stack(name)
      repeat { |deadline| @client.config.get_stack(V1::GetStackRequest.new(name: name), deadline: deadline) }
      Stack.new(self, name)
    end

    # A zeroed Tensor, in a region of its own where the session has regions.
    #
    # ArgumentError: the shape. GRPC::ResourceExhausted: the session's cap on regions, with the numbers.
    def tensor(*shape)
      Tensor.new(self, shape, in_region: @transport == "memfd")
    end

    # Runs a call that may not be repeated. Yields its deadline.
    def once
      yield Time.now + Client::CALL_TIMEOUT
    rescue GRPC::BadStatus
      reason = over
      raise if reason.nil?
      raise GRPC::Unavailable, "this session has ended (#{reason}): its regions and contexts are gone"
    end

    # Runs a call that may be repeated, again while it is not answered.
    def repeat(&call)
      wait = FIRST_WAIT
      (1..).each do |attempt|
        return once(&call)
      rescue *UNANSWERED
        raise if attempt == ATTEMPTS || over
        sleep(wait)
        wait *= 2
      end
    end

    # Runs a mutation exactly once. Yields the Mutation that its request is to carry, and its deadline.
    #
    # A repeat after a lost answer carries the same sequence and the same body, so the daemon gives the first run's
    # answer instead of running again. A call that the daemon refused has not used its sequence up. Where no repeat was
    # answered either, nobody knows whether the sequence was used, and this simple client lets no more mutations follow.
    def mutate
      @mutations.synchronize do
        raise GRPC::FailedPrecondition, @unsure if @unsure
        mutation = V1::Mutation.new(session_id: @id, sequence: @sequence + 1)
        answer = repeat { |deadline| yield mutation, deadline }
        @sequence += 1
        answer
      rescue *UNANSWERED => e
        unless over
          @unsure = "an earlier call was never answered, so it may have run or not (#{e.details}): open a new session"
        end
        raise
      end
    end

    private

    # Opens the KeepAlive stream, waits until the daemon has bound the session to it, and from then on sends a message
    # three times a lease. The stream's end is the session's.
    def hold_lease
      messages = Enumerator.new do |stream|
        stream << V1::KeepAliveRequest.new(session_id: @id)
        stream << V1::KeepAliveRequest.new until over_within(@lease / 3)
      end
      settled = Queue.new
      @keeper = Thread.new do
        reason = "it was deleted"
        @client.sessions.keep_alive(messages) { settled << true if settled.empty? }
      rescue GRPC::BadStatus => e
        reason = e.details
      ensure
        finish(reason)
        settled << false
      end
      bound = Timeout.timeout(Client::CALL_TIMEOUT, GRPC::DeadlineExceeded, "no answer on KeepAlive") { settled.pop }
      raise GRPC::Unavailable, "the session could not be held: #{over}" unless bound
    end

    # Waits for the session's end, for so many seconds at most; whether it came.
    def over_within(seconds)
      @mutex.synchronize do
        @ended.wait(@mutex, seconds) unless @over
        @over
      end
    end

    # Notes why the session is over, once.
    def finish(reason)
      @mutex.synchronize do
        @over ||= reason
        @ended.broadcast
      end
    end

    def choose_transport(wanted)
      @transport, @transport_reason = "inline", "as asked"
      return if wanted == "inline"
      @transport, @transport_reason = "memfd", nil
      tensor(1).free # whether regions can be had here
    rescue GRPC::BadStatus => e
      if wanted == "memfd"
        close
        raise
      end
      @transport, @transport_reason = "inline", e.details
    end
  end
end
