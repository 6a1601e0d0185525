// A relying party with `jose`: verifies an OIDC token by the keys that its issuer publishes. Prints the claims, or the code
// of what is wrong, as JSON. Arguments: the issuer's origin, the token, the audience that it is to be for.

import { createRemoteJWKSet, jwtVerify } from 'jose';

const [origin, token, audience] = process.argv.slice(2);
const discovery = await (await fetch(`${origin}/acme/.well-known/openid-configuration`)).json();
const keys = createRemoteJWKSet(new URL(discovery.jwks_uri));
const verified = jwtVerify(token, keys, { issuer: discovery.issuer, audience, algorithms: ['RS256'] });
console.log(JSON.stringify(await verified.then(({ payload }) => payload, ({ code }) => ({ code }))));
