// A reverse proxy as one would write it in Go: net/http/httputil with its defaults, kept connections, certificates
// verified, a token asked of clients and another added for kubelets.
//
//	reverse_proxy PORT CERTIFICATE KEY CA_FILE DOMAIN
//
// CLIENT_TOKEN and TOKEN come by the environment.
package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"os"
	"strings"
	"time"
)

const prefix = "/api/v1/nodes/"

func main() {
	port, certificate, key, caFile, domain := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5]
	clientToken, token := "Bearer "+os.Getenv("CLIENT_TOKEN"), "Bearer "+os.Getenv("TOKEN")
	pem, err := os.ReadFile(caFile)
	if err != nil {
		log.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(pem)
	dialer := &net.Dialer{Timeout: 5 * time.Second}
	transport := &http.Transport{
		MaxIdleConnsPerHost: 256,
		IdleConnTimeout:     75 * time.Second,
		DisableCompression:  true,
		// A kubelet's certificate names its Node, and the proxy dials its address.
		DialTLSContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			host, _, _ := net.SplitHostPort(address)
			name := strings.ReplaceAll(host, ".", "-") + "." + domain
			return (&tls.Dialer{NetDialer: dialer, Config: &tls.Config{RootCAs: roots, ServerName: name}}).DialContext(ctx, network, address)
		},
	}
	proxy := &httputil.ReverseProxy{
		Transport: transport,
		ErrorLog:  log.New(os.Stderr, "", 0),
		Rewrite: func(request *httputil.ProxyRequest) {
			host, path, _ := strings.Cut(strings.TrimPrefix(request.In.URL.Path, prefix), "/")
			request.Out.URL.Scheme, request.Out.URL.Host, request.Out.URL.Path = "https", host, "/"+path
			request.Out.Header.Set("Authorization", token)
		},
	}
	handler := http.HandlerFunc(func(writer http.ResponseWriter, request *http.Request) {
		if request.Header.Get("Authorization") != clientToken {
			writer.WriteHeader(http.StatusUnauthorized)
			return
		}
		if !strings.HasPrefix(request.URL.Path, prefix) {
			writer.WriteHeader(http.StatusNotFound)
			return
		}
		ctx, cancel := context.WithTimeout(request.Context(), 10*time.Second)
		defer cancel()
		proxy.ServeHTTP(writer, request.WithContext(ctx))
	})
	server := &http.Server{
		Addr: "127.0.0.1:" + port, Handler: handler, ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout: 330 * time.Second, ErrorLog: log.New(os.Stderr, "", 0),
	}
	log.Fatal(server.ListenAndServeTLS(certificate, key))
}
