// A plain Node.js client: streams one generation from a coordinator over mutual TLS, as any program in any language
// would, with the protos of this repository and nothing of Chorus' own code.
//
// node client.js ADDRESS SERVER_NAME CERTS_DIR PROTOS_DIR PROMPT [CANCEL_AFTER]
//
// Prints one JSON object a line: each event as it comes, then {"status": {...}}. With CANCEL_AFTER, the call is cancelled
// after that many deltas.
'use strict';

const fs = require('fs');
const path = require('path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [address, serverName, certsDir, protosDir, prompt, cancelAfter] = process.argv.slice(2);
const read = (name) => fs.readFileSync(path.join(certsDir, name));

const definition = protoLoader.loadSync('chorus/api/coordinator/v1/coordinator.proto', {
  includeDirs: [protosDir],
  keepCase: true,
  longs: String,
  enums: String,
  oneofs: true,
});
const { Coordinator } = grpc.loadPackageDefinition(definition).chorus.api.coordinator.v1;

const client = new Coordinator(
  address,
  grpc.credentials.createSsl(read('ca.crt'), read('tls.key'), read('tls.crt')),
  { 'grpc.ssl_target_name_override': serverName, 'grpc.default_authority': serverName },
);

const metadata = new grpc.Metadata();
metadata.set('x-request-id', 'interop-node');
const print = (object) => process.stdout.write(JSON.stringify(object) + '\n');
const call = client.Generate(
  {
    spec: {
      conversation: { messages: [{ role: 'MESSAGE_ROLE_USER', parts: [{ text: prompt }] }] },
      sampling: { temperature: 0 },
      stop: { max_tokens: 16 },
    },
  },
  metadata,
  { deadline: Date.now() + 60_000 },
);

let deltas = 0;
call.on('data', (message) => {
  print(message.event);
  if (message.event.event === 'delta' && cancelAfter && ++deltas >= Number(cancelAfter)) call.cancel();
});
call.on('error', () => {}); // The status says the same.
call.on('status', (status) => {
  const info = status.metadata.get('grpc-status-details-bin');
  print({ status: { code: status.code, details: status.details, has_error_info: info.length > 0 } });
  client.close();
});
