//! Who gets through to a service, over real ports: certificates, names, tokens.

use std::{
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
};

use dnd_proto::v1::{CheckUploadsRequest, upload_service_client::UploadServiceClient};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, date_time_ymd};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinSet};
use tonic::{Code, Request, Status};
use tonic_health::pb::{HealthCheckRequest, health_client::HealthClient};

use crate::{
    Fault,
    args::{AccessArgs, ServeArgs, TlsArgs},
    auth::{self, Guard, Scope},
    blobs::{self, Blobs},
    channel::Dial,
    fault::reason_of,
    metrics::REFUSED,
    server::{ServeError, Services, serve, serve_on},
    tls::{Acceptor, ClientCertificate},
};

/// A CA, and a folder for what it issues.
struct Authority {
    issuer: Issuer<'static, KeyPair>,
    folder: TempDir,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { issuer: Issuer::new(params, key), folder }
    }

    fn ca(&self) -> PathBuf {
        self.folder.path().join("ca.pem")
    }

    /// A certificate for a name, and the arguments of a program that shows it.
    fn issue(&self, name: &str) -> TlsArgs {
        self.issue_until(name, 2090)
    }

    fn issue_until(&self, name: &str, year: i32) -> TlsArgs {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let file = |ending: &str| self.folder.path().join(format!("{name}-{year}.{ending}"));
        fs::write(file("pem"), cert.pem()).unwrap();
        fs::write(file("key"), key.serialize_pem()).unwrap();
        TlsArgs { tls_cert: Some(file("pem")), tls_key: Some(file("key")), tls_ca: Some(self.ca()), insecure: false }
    }
}

/// A server of uploads on a port of its own; it ends with this value.
struct Running {
    address: SocketAddr,
    _server: JoinSet<()>,
}

async fn start(tls: &TlsArgs, access: &AccessArgs) -> Running {
    let clients = if access.tokens.is_some() { ClientCertificate::Optional } else { ClientCertificate::Required };
    let acceptor = Acceptor::open(tls, clients).unwrap().always();
    let guard = Guard::open(access).unwrap().always();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let services = blobs::add_to(Services::default(), Arc::new(Blobs::temporary().unwrap()));
    let (_, health) = tonic_health::server::health_reporter();
    let mut server = JoinSet::new();
    server.spawn(async move {
        let _ = serve_on(services.with(health), guard, acceptor.incoming(listener), std::future::pending()).await;
    });
    Running { address, _server: server }
}

impl Running {
    fn url(&self, scheme: &str) -> String {
        format!("{scheme}://localhost:{}", self.address.port())
    }

    /// What becomes of a call of a client with these certificates and that token: nothing, or the fault's reason.
    async fn call(&self, tls: &TlsArgs, token: Option<&str>) -> Result<(), String> {
        self.called(tls, token).await.map_err(|fault| fault.reason().to_owned())
    }

    async fn called(&self, tls: &TlsArgs, token: Option<&str>) -> Result<(), Fault> {
        let scheme = if tls.tls_ca.is_some() { "https" } else { "http" };
        let mut client = UploadServiceClient::new(Dial::open(tls, None)?.connect(&self.url(scheme)).await?);
        let called = client.check_uploads(with_token(CheckUploadsRequest { digests: vec!["0".repeat(64)] }, token)).await;
        called.map(drop).map_err(|status| Fault::relayed(&status))
    }
}

fn with_token<T>(message: T, token: Option<&str>) -> Request<T> {
    let mut request = Request::new(message);
    if let Some(token) = token {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    request
}

/// Whether refusals for that reason were counted in this process, of all tests: so only that there are some is certain.
fn counted(reason: &str) -> bool {
    REFUSED.of([reason]).get() > 0
}

#[tokio::test]
async fn only_a_client_with_a_good_certificate_of_the_ca_gets_through_and_only_to_a_server_that_has_one() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = start(&ours.issue("localhost"), &AccessArgs::default()).await;
    let client = ours.issue("orchestrator");
    server.call(&client, None).await.unwrap();

    let trusting = |ca: &Authority, own: TlsArgs| TlsArgs { tls_ca: Some(ca.ca()), ..own };
    let without = TlsArgs { tls_ca: Some(ours.ca()), ..TlsArgs::default() };
    for (what, tls, reason) in [
        ("no certificate", without, "NO_CLIENT_CERTIFICATE"),
        ("of another CA", trusting(&ours, other.issue("orchestrator")), "CLIENT_CERTIFICATE"),
        ("expired", ours.issue_until("orchestrator", 2020), "CLIENT_CERTIFICATE"),
        ("trusts another CA", trusting(&other, client.clone()), "SERVER_CERTIFICATE"),
    ] {
        assert_eq!(server.call(&tls, None).await, Err(reason.to_owned()), "{what}");
    }
    assert!(counted("NO_CLIENT_CERTIFICATE") && counted("CLIENT_CERTIFICATE"));
    for (what, own) in [("another name", ours.issue("captioner")), ("expired", ours.issue_until("localhost", 2020))] {
        let server = start(&own, &AccessArgs::default()).await;
        assert_eq!(server.call(&client, None).await, Err("SERVER_CERTIFICATE".to_owned()), "{what}");
    }
    // In the clear to a port that speaks TLS, and the other way round.
    assert!(server.call(&TlsArgs::default(), None).await.is_err());
    let clear = start(&TlsArgs::default(), &AccessArgs::default()).await;
    clear.call(&TlsArgs::default(), None).await.unwrap();
    assert_eq!(clear.call(&client, None).await, Err("TLS_HANDSHAKE".to_owned()));
    assert!(counted("TLS_HANDSHAKE"));
}

#[tokio::test]
async fn a_lazy_channel_tells_why_as_well() {
    let (ours, other) = (Authority::new(), Authority::new());
    let server = start(&ours.issue("localhost"), &AccessArgs::default()).await;
    let without = TlsArgs { tls_ca: Some(ours.ca()), ..TlsArgs::default() };
    for (tls, reason) in [(without, "NO_CLIENT_CERTIFICATE"), (TlsArgs { tls_ca: Some(other.ca()), ..TlsArgs::default() }, "SERVER_CERTIFICATE")] {
        let called = async {
            let mut client = UploadServiceClient::new(Dial::open(&tls, None)?.lazy(&server.url("https"))?);
            client.check_uploads(CheckUploadsRequest::default()).await.map_err(|status| Fault::relayed(&status))
        };
        assert_eq!(called.await.unwrap_err().reason(), reason);
    }
}

#[tokio::test]
async fn certificates_and_lists_change_without_a_restart() {
    let ours = Authority::new();
    let tls = ours.issue("localhost");
    let allow = ours.folder.path().join("allow.toml");
    fs::write(&allow, "\"dnd.v1.UploadService\" = [\"orchestrator\"]").unwrap();
    let server = start(&tls, &AccessArgs { allow: Some(allow.clone()), tokens: None }).await;
    let (client, stranger) = (ours.issue("orchestrator"), ours.issue("stranger"));
    server.call(&client, None).await.unwrap();
    let refused = server.called(&stranger, None).await.unwrap_err();
    assert_eq!((refused.code(), refused.reason()), (Code::PermissionDenied, "CLIENT_NOT_ALLOWED"));
    assert!(refused.to_string().contains("stranger") && refused.to_string().contains("UploadService"), "{refused}");
    fs::write(&allow, "\"dnd.v1.UploadService/CheckUploads\" = [\"stranger\"]").unwrap();
    server.call(&stranger, None).await.unwrap();
    assert!(server.call(&client, None).await.is_err());

    // A server's new certificate is of another name; then its files can't be right.
    let (cert, key) = (tls.tls_cert.unwrap(), tls.tls_key.unwrap());
    let copy = |from: &TlsArgs| {
        fs::copy(from.tls_cert.as_ref().unwrap(), &cert).unwrap();
        fs::copy(from.tls_key.as_ref().unwrap(), &key).unwrap();
    };
    copy(&ours.issue("elsewhere"));
    assert_eq!(server.call(&stranger, None).await, Err("SERVER_CERTIFICATE".to_owned()));
    copy(&ours.issue_until("localhost", 2091));
    server.call(&stranger, None).await.unwrap();
    fs::write(&cert, "no certificate").unwrap();
    server.call(&stranger, None).await.unwrap();
}

#[tokio::test]
async fn a_call_needs_a_token_with_its_scope_and_a_revoked_one_is_worth_nothing() {
    let ours = Authority::new();
    let (reader, reads) = auth::new_token("reader", Scope::Read, [1; 32]);
    let (runner, runs) = auth::new_token("runner", Scope::Run, [2; 32]);
    let tokens = ours.folder.path().join("tokens.toml");
    fs::write(&tokens, format!("{reads}\n{runs}\n")).unwrap();
    let server = start(&ours.issue("localhost"), &AccessArgs { tokens: Some(tokens.clone()), allow: None }).await;
    // A token is enough: no certificate.
    let client = TlsArgs { tls_ca: Some(ours.ca()), ..TlsArgs::default() };
    server.call(&client, Some(&runner)).await.unwrap();
    for (token, code, reason) in [
        (None, Code::Unauthenticated, "NO_TOKEN"),
        (Some("dnd_0000"), Code::Unauthenticated, "UNKNOWN_TOKEN"),
        (Some(reader.as_str()), Code::PermissionDenied, "MISSING_SCOPE"),
    ] {
        let fault = server.called(&client, token).await.unwrap_err();
        assert_eq!((fault.code(), fault.reason()), (code, reason));
        assert!(token.is_none_or(|token| !fault.to_string().contains(token)), "{fault}");
        assert!(counted(reason), "{reason}");
    }
    // Health needs none, and what the table does not know needs more than to run.
    let channel = Dial::open(&client, None).unwrap().connect(&server.url("https")).await.unwrap();
    HealthClient::new(channel.clone()).check(HealthCheckRequest::default()).await.unwrap();
    let unknown = async |token: &str| -> Status {
        let mut client = tonic::client::Grpc::new(channel.clone());
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<CheckUploadsRequest, CheckUploadsRequest>::default();
        let path = http::uri::PathAndQuery::from_static("/dnd.v1.UploadService/Unknown");
        client.unary(with_token(CheckUploadsRequest::default(), Some(token)), path, codec).await.unwrap_err()
    };
    assert_eq!(reason_of(&unknown(&runner).await).as_deref(), Some("MISSING_SCOPE"));

    fs::write(&tokens, format!("{reads}\n")).unwrap();
    assert_eq!(server.call(&client, Some(&runner)).await, Err("UNKNOWN_TOKEN".to_owned()));
}

fn serve_args(listen: &str, tls: TlsArgs) -> ServeArgs {
    ServeArgs { listen: listen.parse().unwrap(), admin: None, grace: 1, log: String::new(), otlp: None, port_file: None, tls, access: AccessArgs::default() }
}

#[tokio::test]
async fn nothing_is_said_in_the_clear_to_other_machines_unless_that_is_wanted() {
    let loads = || Err::<(), _>("it got as far as to loading");
    let said = |args: ServeArgs| async move { serve(&args, Services::default(), loads).await.unwrap_err() };
    assert!(matches!(said(serve_args("0.0.0.0:0", TlsArgs::default())).await, ServeError::Access(problem) if problem.contains("--insecure")));
    for args in [
        serve_args("127.0.0.1:0", TlsArgs::default()),
        serve_args("0.0.0.0:0", TlsArgs { insecure: true, ..TlsArgs::default() }),
        serve_args("0.0.0.0:0", Authority::new().issue("localhost")),
    ] {
        assert!(matches!(said(args).await, ServeError::Load(_)));
    }

    let dial = |insecure| Dial::open(&TlsArgs { insecure, ..TlsArgs::default() }, None).unwrap();
    for url in ["http://captioner:50051", "captioner:50051", "http://10.0.0.1:50051", "http://127.0.0.1.example.org:1"] {
        assert_eq!(dial(false).lazy(url).unwrap_err().reason(), "INSECURE", "{url}");
        assert!(dial(true).lazy(url).is_ok(), "{url}");
    }
    for url in ["http://localhost:50051", "127.0.0.1:50051", "http://[::1]:50051"] {
        assert!(dial(false).lazy(url).is_ok(), "{url}");
    }
    for url in ["https://captioner:50051", "ftp://captioner", "http://"] {
        assert_eq!(dial(true).lazy(url).unwrap_err().reason(), "INVALID_ENDPOINT", "{url}");
    }
}

#[test]
fn a_file_that_cannot_be_right_is_named_and_not_shown() {
    let ours = Authority::new();
    let good = ours.issue("localhost");
    let wrong = ours.folder.path().join("wrong.pem");
    let swapped = TlsArgs { tls_cert: good.tls_key.clone(), tls_key: good.tls_cert.clone(), ..good.clone() };
    let other_key = TlsArgs { tls_key: ours.issue("other").tls_key, ..good.clone() };
    let missing = TlsArgs { tls_ca: Some(Path::new("/nowhere/ca.pem").to_owned()), ..good.clone() };
    fs::write(&wrong, "-----BEGIN CERTIFICATE-----\nsecret0000\n-----END CERTIFICATE-----\n").unwrap();
    let garbage = TlsArgs { tls_ca: Some(wrong), ..good };
    for (tls, named) in [(swapped, "localhost-2090"), (other_key, "other-2090.key"), (missing, "/nowhere/ca.pem"), (garbage, "wrong.pem")] {
        let problem = Acceptor::open(&tls, ClientCertificate::Required).err().unwrap();
        assert!(problem.contains(named) && !problem.contains("PRIVATE KEY") && !problem.contains("secret0000"), "{problem}");
    }
}
