# A plain Ruby client: streams one generation from a coordinator over mutual TLS, as any program in any language would,
# with classes generated from the protos of this repository and nothing of Chorus' own code.
#
# ruby -I GENERATED client.rb ADDRESS SERVER_NAME CERTS_DIR PROMPT
#
# Prints one JSON object a line: each event as it comes, then {"status": {...}}.
# frozen_string_literal: true

require 'json'
require 'grpc'
require 'chorus/api/coordinator/v1/coordinator_services_pb'

address, server_name, certs_dir, prompt = ARGV
read = ->(name) { File.read(File.join(certs_dir, name)) }
V1 = Chorus::Api::Inference::V1

credentials = GRPC::Core::ChannelCredentials.new(read['ca.crt'], read['tls.key'], read['tls.crt'])
stub = Chorus::Api::Coordinator::V1::Coordinator::Stub.new(
  address, credentials, channel_args: { GRPC::Core::Channel::SSL_TARGET => server_name }
)

request = Chorus::Api::Coordinator::V1::GenerateRequest.new(
  spec: V1::GenerationSpec.new(
    conversation: V1::Conversation.new(
      messages: [V1::Message.new(role: :MESSAGE_ROLE_USER, parts: [V1::Part.new(text: prompt)])]
    ),
    sampling: V1::Sampling.new(temperature: 0),
    stop: V1::StopConditions.new(max_tokens: 16)
  )
)

$stdout.sync = true
begin
  responses = stub.generate(request, metadata: { 'x-request-id' => 'interop-ruby' }, deadline: Time.now + 60)
  responses.each { |response| puts response.event.to_json(preserve_proto_fieldnames: true) }
  puts JSON.generate(status: { code: 0, details: '' })
rescue GRPC::BadStatus => e
  puts JSON.generate(status: { code: e.code, details: e.details })
end
