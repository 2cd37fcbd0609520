# A client of laminad: connect, open a session, train a stack.
#
#   Lamina::Client.open do |client|                 # LAMINA_TARGET, or the daemon's usual socket
#     client.session do |session|
#       stack = session.create_stack("demo", batch_size: 8, max_seq_length: 128, ...)
#       x = session.tensor(8, 128, 256)             # in memory that the daemon maps too
#       context = stack.forward(x, y)
#
# It is an example to read and to begin from: training steps of fp32 stacks, each exactly once. What else the daemon
# does is in the generated classes and stubs of Lamina::V1, which work beside it.
#
# Errors are GRPC::BadStatus with the daemon's own message: `code` and `details`; Lamina.request_id(error) says by what id
# the daemon's log calls the call.
#
# Needs Ruby 3.1 (IO::Buffer), the gem grpc, and lamina/v1 as scripts/ruby-stubs generates it.

require "lamina/client"
