// Streams by a client that knows nothing of Chorus but its protos, over mutual TLS, and that survives a coordinator:
// it keeps the token ids that were delivered, and what Started said of seed and artifact; where a stream breaks off,
// it sends the same request with them to another coordinator, and the stream goes on with the next index.
//
// node streams.js CERTS_DIR PROTOS_DIR COUNT ADDRESS=SERVER_NAME...
//
// Runs COUNT streams at any time until its standard input ends. Prints a line of JSON for each that has ended.
'use strict';

const fs = require('fs');
const path = require('path');
const grpc = require('@grpc/grpc-js');
const protoLoader = require('@grpc/proto-loader');

const [certsDir, protosDir, count, ...coordinators] = process.argv.slice(2);
const read = (name) => fs.readFileSync(path.join(certsDir, name));
const definition = protoLoader.loadSync('chorus/api/coordinator/v1/coordinator.proto', {
  includeDirs: [protosDir], keepCase: true, longs: String, enums: String, oneofs: true,
});
const { Coordinator } = grpc.loadPackageDefinition(definition).chorus.api.coordinator.v1;
const credentials = grpc.credentials.createSsl(read('ca.crt'), read('tls.key'), read('tls.crt'));
const clients = coordinators.map((text) => {
  const [address, name] = text.split('=');
  return new Coordinator(address, credentials, {
    'grpc.ssl_target_name_override': name, 'grpc.default_authority': name,
    'grpc.initial_reconnect_backoff_ms': 100, 'grpc.max_reconnect_backoff_ms': 1000,
  });
});

const TIMEOUT_MS = 120_000;
const WAIT_MS = 10_000; // for a coordinator that goes on
const AGAIN_MS = 100;
const GOES_ON = new Set([grpc.status.UNAVAILABLE, grpc.status.CANCELLED, grpc.status.INTERNAL]);
let running = true;
let numbers = 0;

function stream(place, done) {
  const prompt = `node stream ${numbers++}`;
  const ids = [];
  const gaps = [];
  const deadline = Date.now() + TIMEOUT_MS;
  let at = place % clients.length;
  let attempt = 1, outOfTurn = 0, lost = '', last = 0, since = 0, seed, sha256;

  function ask() {
    const spec = { prompt };
    if (ids.length) {
      spec.resume = { choices: [{ choice: 0, token_ids: ids }] };
      spec.sampling = { seed };
      spec.requirements = { artifact_sha256: sha256 };
    }
    const call = clients[at].Generate({ spec, attempt }, { deadline });
    let finished = false;
    call.on('data', ({ event }) => {
      const now = Date.now();
      if (event.event === 'started') {
        if (!ids.length) ({ seed, artifact_sha256: sha256 } = event.started);
        attempt = event.started.attempt || attempt;
      } else if (event.event === 'attempt_changed') {
        attempt = event.attempt_changed.attempt;
        lost = 'runner';
      } else if (event.event === 'delta') {
        if (lost && ids.length) gaps.push({ lost, ms: now - last, at: now });
        lost = '';
        last = now;
        since = 0;
        if ((event.delta.index || 0) !== ids.length) // proto3 leaves a zero out
          outOfTurn++;
        ids.push(...event.delta.token_ids);
      } else if (event.event === 'finished') {
        finished = true;
      }
    });
    call.on('error', () => {}); // the status says the same
    call.on('status', (status) => {
      if (finished && status.code === grpc.status.OK) {
        done({ prompt, ids, gaps, out_of_turn: outOfTurn });
      } else if (running && GOES_ON.has(status.code) && (!since || Date.now() - since < WAIT_MS)) {
        const pause = since ? AGAIN_MS : 0;
        since = since || Date.now();
        lost = 'coordinator';
        attempt++;
        at = (at + 1) % clients.length;
        setTimeout(ask, pause);
      } else if (running) {
        done({ prompt, code: status.code, error: status.details || 'the stream ended early' });
      }
    });
  }
  ask();
}

function repeat(place) {
  if (!running) return;
  stream(place, (told) => {
    process.stdout.write(JSON.stringify(told) + '\n');
    repeat(place);
  });
}

for (let place = 0; place < Number(count); place++) repeat(place);
process.stdin.on('end', () => {
  running = false;
  for (const client of clients) client.close();
  process.exit(0);
});
process.stdin.resume();
