package lamina

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Security is how a client over TCP knows its daemon, and how the daemon knows the client. Over a Unix socket nothing of
// it is used: there the daemon knows callers by their users. The files are PEM; CA and certificate are read by Connect,
// the token at each call.
type Security struct {
	TLS        bool   // with the system's authorities; the next four imply it
	CA         string // file: who may have signed the daemon's certificate
	Cert, Key  string // files: the client's own certificate and its key
	ServerName string // in the daemon's certificate; "": the target's host
	TokenFile  string // holds a bearer token and nothing else
}

// SecurityFromEnvironment is what LAMINA_TLS, LAMINA_TLS_CA, LAMINA_CLIENT_CERT, LAMINA_CLIENT_KEY,
// LAMINA_TLS_SERVER_NAME and LAMINA_TOKEN_FILE say.
func SecurityFromEnvironment() Security {
	on := os.Getenv("LAMINA_TLS")
	return Security{
		TLS: on != "" && on != "0", CA: os.Getenv("LAMINA_TLS_CA"), Cert: os.Getenv("LAMINA_CLIENT_CERT"),
		Key: os.Getenv("LAMINA_CLIENT_KEY"), ServerName: os.Getenv("LAMINA_TLS_SERVER_NAME"),
		TokenFile: os.Getenv("LAMINA_TOKEN_FILE"),
	}
}

func (s Security) options(target string) ([]grpc.DialOption, error) {
	if strings.HasPrefix(target, "unix:") {
		return []grpc.DialOption{grpc.WithInsecure()}, nil
	}
	secure := s.TLS || s.CA != "" || s.Cert != "" || s.Key != "" || s.ServerName != ""
	var options []grpc.DialOption
	if secure {
		config := &tls.Config{ServerName: s.ServerName, MinVersion: tls.VersionTLS12}
		if s.CA != "" {
			pem, err := os.ReadFile(s.CA)
			if err != nil {
				return nil, err
			}
			config.RootCAs = x509.NewCertPool()
			if !config.RootCAs.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("%s has no certificate", s.CA)
			}
		}
		if s.Cert != "" || s.Key != "" {
			pair, err := tls.LoadX509KeyPair(s.Cert, s.Key)
			if err != nil {
				return nil, err
			}
			config.Certificates = []tls.Certificate{pair}
		}
		options = append(options, grpc.WithTransportCredentials(credentials.NewTLS(config)))
	} else {
		options = append(options, grpc.WithInsecure())
	}
	if s.TokenFile != "" {
		if !secure && !isLoopback(target) {
			return nil, fmt.Errorf("the token would cross the network to %s unencrypted; set CA or TLS", target)
		}
		token := bearer{s.TokenFile, secure}
		if _, err := token.GetRequestMetadata(context.Background()); err != nil {
			return nil, err
		}
		options = append(options, grpc.WithPerRPCCredentials(token))
	}
	return options, nil
}

func isLoopback(target string) bool {
	host, _, err := net.SplitHostPort(target)
	address := net.ParseIP(host)
	return err == nil && (host == "localhost" || address != nil && address.IsLoopback())
}

// bearer shows the token of a file with every call.
type bearer struct {
	path   string
	secure bool
}

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	content, err := os.ReadFile(b.path)
	if err != nil {
		return nil, err
	}
	words := strings.Fields(string(content))
	if len(words) != 1 {
		return nil, fmt.Errorf("%s must hold one token and nothing else", b.path)
	}
	return map[string]string{"authorization": "Bearer " + words[0]}, nil
}

func (b bearer) RequireTransportSecurity() bool { return b.secure }
