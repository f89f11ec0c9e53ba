// Program clouds stands in for what trusts a job's token, where the real thing cannot run here:
//
//   - HashiCorp Vault: logins are decided by Vault's own JWT auth method (github.com/hashicorp/vault-plugin-auth-jwt), as Vault runs it.
//     What is around it, tokens, one secret and the transit engine's signatures, follows the API's documentation.
//   - Google Cloud: Security Token Service (v1.token) and IAM Service Account Credentials (generateAccessToken).
//   - Microsoft Entra: the token endpoint, for client assertions of federated identity credentials.
//
// The last two follow their documentation; tokens are verified by github.com/hashicorp/cap. Nothing here is written with Mayfly's client in
// mind: whatever it meets has to look like the job of a workflow to it.
package main

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"flag"
	"fmt"
	"log"
	"net/http"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/cap/jwt"
	"github.com/hashicorp/go-hclog"
	jwtauth "github.com/hashicorp/vault-plugin-auth-jwt"
	"github.com/hashicorp/vault/sdk/logical"
)

// A token that was given out.
type token struct {
	identity string
	scopes   []string
	policies []string
	expires  time.Time
}

// What a tenant's administrator wrote down: whose token makes one the client, to the letter.
type federated struct {
	ClientID string `json:"clientId"`
	Subject  string `json:"subject"`
	Audience string `json:"audience"`
}

type clouds struct {
	issuer    string
	root      string
	signer    string
	validator *jwt.Validator
	vault     logical.Backend
	storage   logical.Storage

	lock      sync.Mutex
	tokens    map[string]token
	federated []federated
	keys      map[string]*rsa.PrivateKey
}

func main() {
	address := flag.String("address", ":9443", "where to listen (TLS)")
	certificate := flag.String("certificate", "", "certificate, PEM file")
	key := flag.String("key", "", "its key, PEM file")
	issuer := flag.String("issuer", "", "issuer that is trusted")
	authority := flag.String("authority", "", "authority of the issuer's certificate, PEM file")
	root := flag.String("root-token-file", "", "file with the administrator's token")
	signer := flag.String("signer-token-file", "", "file with a token of Vault that signs with any key of the transit engine, and no more")
	flag.Parse()
	if err := run(*address, *certificate, *key, *issuer, *authority, *root, *signer); err != nil {
		log.Fatal(err)
	}
}

func run(address, certificate, key, issuer, authority, rootFile, signerFile string) error {
	ctx := context.Background()
	trusted, err := os.ReadFile(authority)
	if err != nil {
		return err
	}
	root, err := os.ReadFile(rootFile)
	if err != nil {
		return err
	}
	signer, err := os.ReadFile(signerFile)
	if err != nil {
		return err
	}
	keys, err := jwt.NewOIDCDiscoveryKeySet(ctx, issuer, string(trusted))
	if err != nil {
		return fmt.Errorf("the issuer's keys: %w", err)
	}
	validator, err := jwt.NewValidator(keys)
	if err != nil {
		return err
	}
	storage := &logical.InmemStorage{}
	vault, err := jwtauth.Factory(ctx, &logical.BackendConfig{
		Logger:      hclog.New(&hclog.LoggerOptions{Name: "jwt", Output: os.Stderr}),
		System:      &logical.StaticSystemView{DefaultLeaseTTLVal: time.Hour, MaxLeaseTTLVal: 24 * time.Hour},
		StorageView: storage,
	})
	if err != nil {
		return err
	}
	c := &clouds{
		issuer: issuer, root: strings.TrimSpace(string(root)), signer: strings.TrimSpace(string(signer)),
		validator: validator, vault: vault, storage: storage, tokens: map[string]token{}, keys: map[string]*rsa.PrivateKey{},
	}
	if _, err := c.method(ctx, "config", map[string]any{
		"oidc_discovery_url": issuer, "oidc_discovery_ca_pem": string(trusted), "bound_issuer": issuer,
	}); err != nil {
		return err
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /health", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	mux.HandleFunc("POST /v1/auth/jwt/role/{role}", c.vaultRole)
	mux.HandleFunc("POST /v1/auth/jwt/login", c.vaultLogin)
	mux.HandleFunc("GET /v1/auth/token/lookup-self", c.vaultLookup)
	mux.HandleFunc("POST /v1/auth/token/revoke-self", c.vaultRevoke)
	mux.HandleFunc("GET /v1/secret/data/{name}", c.vaultSecret)
	mux.HandleFunc("POST /v1/transit/sign/{key}", c.vaultSign)
	mux.HandleFunc("POST /control/transit-keys/{key}", c.vaultKey)
	mux.HandleFunc("POST /v1/token", c.googleToken)
	mux.HandleFunc("POST /v1/projects/-/serviceAccounts/{account}", c.googleImpersonate)
	mux.HandleFunc("POST /{tenant}/oauth2/v2.0/token", c.entraToken)
	mux.HandleFunc("GET /{tenant}/v2.0/.well-known/openid-configuration", c.entraDiscovery)
	mux.HandleFunc("POST /control/federated-credentials", c.entraFederate)
	mux.HandleFunc("GET /whoami", c.whoami)
	log.Printf("listening on %s", address)
	return http.ListenAndServeTLS(address, certificate, key, mux)
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	if body != nil {
		_ = json.NewEncoder(w).Encode(body)
	}
}

func secret(prefix string) string {
	random := make([]byte, 24)
	_, _ = rand.Read(random)
	return prefix + hex.EncodeToString(random)
}

func (c *clouds) give(prefix string, t token) string {
	c.lock.Lock()
	defer c.lock.Unlock()
	value := secret(prefix)
	c.tokens[value] = t
	return value
}

func (c *clouds) known(value string) (token, bool) {
	c.lock.Lock()
	defer c.lock.Unlock()
	t, ok := c.tokens[value]
	return t, ok && time.Now().Before(t.expires)
}

func bearer(r *http.Request) string {
	value, _ := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	return value
}

// Any API that takes a token of Google's or of Entra's.
func (c *clouds) whoami(w http.ResponseWriter, r *http.Request) {
	t, ok := c.known(bearer(r))
	if !ok {
		answer(w, http.StatusUnauthorized, nil)
		return
	}
	answer(w, http.StatusOK, map[string]any{"identity": t.identity, "scopes": t.scopes, "expires": t.expires.Unix()})
}

// The claims of a token of the trusted issuer with exactly one audience, this one.
func (c *clouds) verified(r *http.Request, text, audience string) (map[string]any, error) {
	expected := jwt.Expected{Issuer: c.issuer, Audiences: []string{audience}, SigningAlgorithms: []jwt.Alg{jwt.RS256}}
	return c.validator.Validate(r.Context(), text, expected)
}

// ---- Vault

func (c *clouds) method(ctx context.Context, path string, data map[string]any) (*logical.Response, error) {
	response, err := c.vault.HandleRequest(ctx, &logical.Request{
		Operation: logical.UpdateOperation, Path: path, Storage: c.storage, Data: data, Connection: &logical.Connection{},
	})
	if err == nil && response.IsError() {
		err = response.Error()
	}
	return response, err
}

func vaultErrors(w http.ResponseWriter, status int, errors ...string) {
	answer(w, status, map[string]any{"errors": errors})
}

func read(w http.ResponseWriter, r *http.Request) (map[string]any, bool) {
	var body map[string]any
	decoder := json.NewDecoder(http.MaxBytesReader(w, r.Body, 1<<20))
	decoder.UseNumber()
	if err := decoder.Decode(&body); err != nil {
		answer(w, http.StatusBadRequest, map[string]any{"errors": []string{err.Error()}})
		return nil, false
	}
	return body, true
}

// What whoever has this token of Vault asks for; nobody else is heard.
func readFrom(w http.ResponseWriter, r *http.Request, token string) (map[string]any, bool) {
	if r.Header.Get("X-Vault-Token") != token {
		vaultErrors(w, http.StatusForbidden, "1 error occurred:\n\t* permission denied\n\n")
		return nil, false
	}
	return read(w, r)
}

func (c *clouds) vaultRole(w http.ResponseWriter, r *http.Request) {
	body, ok := readFrom(w, r, c.root)
	if !ok {
		return
	}
	response, err := c.vault.HandleRequest(r.Context(), &logical.Request{
		Operation: logical.CreateOperation, Path: "role/" + r.PathValue("role"), Storage: c.storage, Data: body,
	})
	if err == nil && response.IsError() {
		err = response.Error()
	}
	if err != nil {
		vaultErrors(w, http.StatusBadRequest, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func (c *clouds) vaultLogin(w http.ResponseWriter, r *http.Request) {
	body, ok := read(w, r)
	if !ok {
		return
	}
	response, err := c.method(r.Context(), "login", body)
	if err != nil || response == nil || response.Auth == nil {
		vaultErrors(w, http.StatusBadRequest, fmt.Sprint(err))
		return
	}
	auth := response.Auth
	life := auth.TTL
	if life == 0 {
		life = time.Hour
	}
	given := c.give("hvs.", token{identity: auth.DisplayName, policies: auth.Policies, expires: time.Now().Add(life)})
	answer(w, http.StatusOK, map[string]any{
		"request_id": secret(""), "lease_id": "", "renewable": false, "lease_duration": 0, "data": nil, "wrap_info": nil, "warnings": nil,
		"auth": map[string]any{
			"client_token": given, "accessor": secret("")[:24], "policies": append([]string{"default"}, auth.Policies...),
			"token_policies": append([]string{"default"}, auth.Policies...), "metadata": auth.Metadata,
			"lease_duration": int(life.Seconds()), "renewable": true, "entity_id": "", "token_type": "service", "orphan": true,
		},
	})
}

func (c *clouds) vaultToken(w http.ResponseWriter, r *http.Request) (string, token, bool) {
	value := r.Header.Get("X-Vault-Token")
	t, ok := c.known(value)
	if !ok || !strings.HasPrefix(value, "hvs.") {
		vaultErrors(w, http.StatusForbidden, "permission denied", "invalid token")
		return "", token{}, false
	}
	return value, t, true
}

func (c *clouds) vaultLookup(w http.ResponseWriter, r *http.Request) {
	if _, t, ok := c.vaultToken(w, r); ok {
		ttl := int(time.Until(t.expires).Seconds())
		answer(w, http.StatusOK, map[string]any{"data": map[string]any{"display_name": t.identity, "policies": t.policies, "ttl": ttl}})
	}
}

func (c *clouds) vaultRevoke(w http.ResponseWriter, r *http.Request) {
	if value, _, ok := c.vaultToken(w, r); ok {
		c.lock.Lock()
		delete(c.tokens, value)
		c.lock.Unlock()
		w.WriteHeader(http.StatusNoContent)
	}
}

// A secret of the key-value store, version 2: each policy of a token reads the one of its own name.
func (c *clouds) vaultSecret(w http.ResponseWriter, r *http.Request) {
	_, t, ok := c.vaultToken(w, r)
	if !ok {
		return
	}
	name := r.PathValue("name")
	if !slices.Contains(t.policies, name) {
		vaultErrors(w, http.StatusForbidden, "1 error occurred:\n\t* permission denied\n\n")
		return
	}
	answer(w, http.StatusOK, map[string]any{"data": map[string]any{
		"data": map[string]any{"value": "the secret of " + name}, "metadata": map[string]any{"version": 1},
	}})
}

// A key of the transit engine. Vault's own import takes it wrapped.
func (c *clouds) vaultKey(w http.ResponseWriter, r *http.Request) {
	body, ok := readFrom(w, r, c.root)
	if !ok {
		return
	}
	text, _ := body["pem"].(string)
	block, _ := pem.Decode([]byte(text))
	if block == nil {
		vaultErrors(w, http.StatusBadRequest, "no PEM")
		return
	}
	key, err := x509.ParsePKCS1PrivateKey(block.Bytes)
	if err != nil {
		parsed, other := x509.ParsePKCS8PrivateKey(block.Bytes)
		if key, ok = parsed.(*rsa.PrivateKey); other != nil || !ok {
			vaultErrors(w, http.StatusBadRequest, err.Error())
			return
		}
	}
	c.lock.Lock()
	c.keys[r.PathValue("key")] = key
	c.lock.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

func (c *clouds) vaultSign(w http.ResponseWriter, r *http.Request) {
	body, ok := readFrom(w, r, c.signer)
	if !ok {
		return
	}
	c.lock.Lock()
	key := c.keys[r.PathValue("key")]
	c.lock.Unlock()
	input, err := base64.StdEncoding.DecodeString(fmt.Sprint(body["input"]))
	if key == nil || err != nil || body["hash_algorithm"] != "sha2-256" || body["signature_algorithm"] != "pkcs1v15" {
		vaultErrors(w, http.StatusBadRequest, "signing key not found, or not with these parameters")
		return
	}
	digest := sha256.Sum256(input)
	signature, err := rsa.SignPKCS1v15(nil, key, crypto.SHA256, digest[:])
	if err != nil {
		vaultErrors(w, http.StatusInternalServerError, err.Error())
		return
	}
	answer(w, http.StatusOK, map[string]any{"data": map[string]any{
		"signature": "vault:v1:" + base64.StdEncoding.EncodeToString(signature), "key_version": 1,
	}})
}

// ---- Google

func oauthError(w http.ResponseWriter, status int, code, description string) {
	answer(w, status, map[string]any{"error": code, "error_description": description})
}

func (c *clouds) googleToken(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		oauthError(w, http.StatusBadRequest, "invalid_request", err.Error())
		return
	}
	form := r.PostForm
	audience, kind := form.Get("audience"), form.Get("subject_token_type")
	provider, ok := strings.CutPrefix(audience, "//iam.googleapis.com/projects/")
	switch {
	case form.Get("grant_type") != "urn:ietf:params:oauth:grant-type:token-exchange":
		oauthError(w, http.StatusBadRequest, "unsupported_grant_type", "")
		return
	case !ok || form.Get("requested_token_type") != "urn:ietf:params:oauth:token-type:access_token" || form.Get("scope") == "":
		oauthError(w, http.StatusBadRequest, "invalid_request", "Invalid value for audience, requested_token_type or scope.")
		return
	case kind != "urn:ietf:params:oauth:token-type:jwt" && kind != "urn:ietf:params:oauth:token-type:id_token":
		oauthError(w, http.StatusBadRequest, "invalid_request", "Invalid value for subject_token_type.")
		return
	}
	// Where a provider names no audiences of its own, it takes its resource name.
	claims, err := c.verified(r, form.Get("subject_token"), "https://iam.googleapis.com/projects/"+provider)
	if err != nil {
		oauthError(w, http.StatusBadRequest, "invalid_grant", err.Error())
		return
	}
	until, _ := claims["exp"].(float64)
	life := min(time.Until(time.Unix(int64(until), 0)), time.Hour)
	t := token{identity: fmt.Sprintf("principal:%v", claims["sub"]), scopes: strings.Fields(form.Get("scope")), expires: time.Now().Add(life)}
	answer(w, http.StatusOK, map[string]any{
		"access_token": c.give("ya29.d.", t), "issued_token_type": "urn:ietf:params:oauth:token-type:access_token",
		"token_type": "Bearer", "expires_in": int(life.Seconds()),
	})
}

func googleError(w http.ResponseWriter, code int, status, message string) {
	answer(w, code, map[string]any{"error": map[string]any{"code": code, "message": message, "status": status}})
}

func (c *clouds) googleImpersonate(w http.ResponseWriter, r *http.Request) {
	account, ok := strings.CutSuffix(r.PathValue("account"), ":generateAccessToken")
	if !ok {
		googleError(w, http.StatusNotFound, "NOT_FOUND", "Not found.")
		return
	}
	may := func(scope string) bool {
		return scope == "https://www.googleapis.com/auth/cloud-platform" || scope == "https://www.googleapis.com/auth/iam"
	}
	if t, ok := c.known(bearer(r)); !ok || !slices.ContainsFunc(t.scopes, may) {
		googleError(w, http.StatusUnauthorized, "UNAUTHENTICATED", "Request had invalid authentication credentials.")
		return
	}
	var body struct {
		Scope    []string `json:"scope"`
		Lifetime string   `json:"lifetime"`
	}
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil || len(body.Scope) == 0 {
		googleError(w, http.StatusBadRequest, "INVALID_ARGUMENT", "Request contains an invalid argument.")
		return
	}
	life := time.Hour
	if body.Lifetime != "" {
		asked, err := time.ParseDuration(body.Lifetime)
		if err != nil || asked <= 0 || asked > time.Hour {
			googleError(w, http.StatusBadRequest, "INVALID_ARGUMENT", "The access token lifetime is out of range.")
			return
		}
		life = asked
	}
	until := time.Now().Add(life)
	given := c.give("ya29.c.", token{identity: account, scopes: body.Scope, expires: until})
	answer(w, http.StatusOK, map[string]any{"accessToken": given, "expireTime": until.UTC().Format(time.RFC3339)})
}

// ---- Microsoft Entra

func (c *clouds) entraFederate(w http.ResponseWriter, r *http.Request) {
	var one federated
	if r.Header.Get("X-Vault-Token") != c.root || json.NewDecoder(r.Body).Decode(&one) != nil {
		answer(w, http.StatusForbidden, nil)
		return
	}
	c.lock.Lock()
	c.federated = append(c.federated, one)
	c.lock.Unlock()
	w.WriteHeader(http.StatusNoContent)
}

// What clients look up before they ask for a token.
func (c *clouds) entraDiscovery(w http.ResponseWriter, r *http.Request) {
	base := "https://" + r.Host + "/" + r.PathValue("tenant")
	answer(w, http.StatusOK, map[string]any{
		"issuer": base + "/v2.0", "token_endpoint": base + "/oauth2/v2.0/token", "authorization_endpoint": base + "/oauth2/v2.0/authorize",
	})
}

func entraError(w http.ResponseWriter, code string, number int, description string) {
	answer(w, http.StatusUnauthorized, map[string]any{
		"error": code, "error_description": fmt.Sprintf("AADSTS%d: %s", number, description), "error_codes": []int{number},
	})
}

func (c *clouds) entraToken(w http.ResponseWriter, r *http.Request) {
	if err := r.ParseForm(); err != nil {
		entraError(w, "invalid_request", 900144, err.Error())
		return
	}
	form := r.PostForm
	kind := "urn:ietf:params:oauth:client-assertion-type:jwt-bearer"
	if form.Get("grant_type") != "client_credentials" || form.Get("client_assertion_type") != kind {
		entraError(w, "unsupported_grant_type", 70003, "The app requested an unsupported grant type.")
		return
	}
	if scopes := strings.Fields(form.Get("scope")); len(scopes) != 1 || !strings.HasSuffix(scopes[0], "/.default") {
		entraError(w, "invalid_scope", 70011, "The provided value for scope is not valid.")
		return
	}
	c.lock.Lock()
	credentials := slices.Clone(c.federated)
	c.lock.Unlock()
	for _, one := range credentials {
		if one.ClientID != form.Get("client_id") {
			continue
		}
		claims, err := c.verified(r, form.Get("client_assertion"), one.Audience)
		if err == nil && claims["sub"] == one.Subject {
			life := 75 * time.Minute
			t := token{identity: one.ClientID, scopes: strings.Fields(form.Get("scope")), expires: time.Now().Add(life)}
			answer(w, http.StatusOK, map[string]any{
				"token_type": "Bearer", "expires_in": int(life.Seconds()), "ext_expires_in": int(life.Seconds()), "access_token": c.give("eyJ.", t),
			})
			return
		}
	}
	entraError(w, "invalid_client", 700213, "No matching federated identity record found for presented assertion.")
}
