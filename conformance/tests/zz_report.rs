use tilefold_conformance::{report::Report, subject, suite};
#[test]
fn report() {
    for c in subject::candidates() {
        let Ok(s) = c.subject else { continue };
        for dtype in tilefold_conformance::case::DTYPES {
            let r = Report::of(suite::trials(&s, &suite::Filter { dtypes: vec![dtype], ..Default::default() }), |_| ());
            for g in r.groups() {
                println!("{dtype} {g:?}");
            }
            for f in r.failures() {
                println!("FAIL {} {}", f.0, f.1);
            }
            for f in r.skips() {
                println!("SKIP {} {}", f.0, f.1);
            }
        }
    }
}
