require "io/wait"
require "socket"

module Lamina
  # A row-major array of fp32 values: in a region that this process and the daemon map, or in memory of this process
  # that is copied into each message. Made by Session#tensor. Not to be touched while a call uses it.
  class Tensor
    BYTES = 4 # of a value

    # Extents, outermost first; each >= 1, at most four.
    attr_reader :shape
    # The memory: an IO::Buffer. get_value(:f32, 4 * i) and set_value read and write a value in place.
    attr_reader :buffer

    def initialize(session, shape, in_region:)
      unless shape.all? { |extent| extent.is_a?(Integer) && extent >= 1 }
        raise ArgumentError, "shape #{shape}: extents must be integers, 1 or more"
      end
      @session = session
      @shape = shape
      @count = shape.inject(1, :*)
      if in_region
        @region_id, @buffer = new_region(BYTES * @count)
      else
        @buffer = quietly { IO::Buffer.new(BYTES * @count) }
      end
    end

    # All values, copied into an Array of Floats.
    def values
      @buffer.get_string(0, BYTES * @count).unpack("e*")
    end

    # Writes all values, rounded to fp32.
    def values=(values)
      raise ArgumentError, "#{values.size} values for #{@count}" unless values.size == @count
      @buffer.set_string(values.pack("e*"))
    end

    # Gives the memory back; there is no `values` from then on.
    def free
      @buffer.free
      release_region(@region_id) if @region_id
      @region_id = nil
    end

    # What a request says of the tensor.
    def message
      content = @region_id ? { slice: slice } : { inline_data: @buffer.get_string(0, BYTES * @count) }
      V1::Tensor.new(dtype: :DATA_TYPE_FLOAT32, shape: @shape, **content)
    end

    # Asks for a result in this tensor.
    def target
      V1::TensorTarget.new(**(@region_id ? { slice: slice } : { inline: V1::InlineTarget.new }))
    end

    # Copies what an answer carries inside; a result in a region is there already.
    def take(answer)
      @buffer.set_string(answer.inline_data) unless @region_id
    end

    private

    def slice
      V1::Slice.new(region_id: @region_id, offset_bytes: 0, size_bytes: BYTES * @count)
    end

    # Makes a region and maps it. Not repeated: a lost answer would leave a region that nobody knows.
    def new_region(bytes)
      raise GRPC::Unavailable, "the daemon has no broker socket" if @session.broker_path.empty?
      request = V1::CreateRegionRequest.new(session_id: @session.id, kind: :REGION_KIND_MEMFD, size_bytes: bytes)
      region = @session.once do |deadline|
        @session.client.sessions.create_region(request, deadline: deadline).region
      end
      [region.region_id, map_region(region)]
    rescue SystemCallError, IOError => e
      release_region(region.region_id)
      raise GRPC::Unavailable, "broker socket #{@session.broker_path}: #{e.message}"
    end

    # Gives a region back. An error is no matter: it goes with the session.
    def release_region(id)
      request = V1::ReleaseRegionRequest.new(session_id: @session.id, region_id: id)
      @session.once { |deadline| @session.client.sessions.release_region(request, deadline: deadline) }
    rescue GRPC::BadStatus
      nil
    end

    # Asks the broker for the region's descriptor and maps it: docs/broker.md.
    def map_region(region)
      socket = Socket.new(:UNIX, :SEQPACKET)
      socket.connect(Socket.sockaddr_un(@session.broker_path))
      socket.send("LMN1#{@session.id}#{region.region_id}", 0)
      raise IOError, "no answer" unless socket.wait_readable(10)
      answer, _, _, rights = socket.recvmsg(12, 0, nil, scm_rights: true)
      descriptor = rights&.unix_rights&.first
      raise IOError, "refuses this user" unless answer.bytesize == 12
      status, length = answer.unpack("L<Q<")
      unless status.zero? && descriptor && length == region.length_bytes
        # Another daemon's: one on another host names the same path, say.
        raise IOError, "does not know the region (status #{status})"
      end
      quietly { IO::Buffer.map(descriptor, length) }
    ensure
      descriptor&.close # the mapping stays
      socket&.close
    end

    # Ruby 3.1 warns each time that IO::Buffer is experimental.
    def quietly
      before = Warning[:experimental]
      Warning[:experimental] = false
      yield
    ensure
      Warning[:experimental] = before
    end
  end
end
