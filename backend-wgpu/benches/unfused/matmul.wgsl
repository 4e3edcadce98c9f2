// c[b, m, n] = scale * sum over k of a[b, m, k] b[b, k, n] for every row and head b: 4 x 4 elements a thread.

struct Params {
    m: u32, n: u32, k: u32, heads: u32,
    a_row: u32, a_head: u32, a_m: u32, a_k: u32,
    b_row: u32, b_head: u32, b_k: u32, b_n: u32,
    c_row: u32, c_head: u32, c_m: u32, c_n: u32,
    scale: f32, unused0: u32, unused1: u32, unused2: u32,
}

@group(0) @binding(0) var<uniform> params: Params;
@group(0) @binding(1) var<storage, read> a: array<f32>;
@group(0) @binding(2) var<storage, read> b: array<f32>;
@group(0) @binding(3) var<storage, read_write> c: array<f32>;

@compute @workgroup_size(8, 8)
fn main(@builtin(global_invocation_id) thread: vec3<u32>) {
    let row = thread.z / params.heads;
    let head = thread.z % params.heads;
    let a_at = row * params.a_row + head * params.a_head;
    let b_at = row * params.b_row + head * params.b_head;
    let c_at = row * params.c_row + head * params.c_head;
    let m = thread.y * 4u;
    let n = thread.x * 4u;
    if (m >= params.m || n >= params.n) {
        return;
    }
    var sum: array<vec4<f32>, 4>;
    for (var k = 0u; k < params.k; k++) {
        var y: vec4<f32>;
        for (var j = 0u; j < 4u; j++) {
            y[j] = b[b_at + k * params.b_k + min(n + j, params.n - 1u) * params.b_n];
        }
        for (var i = 0u; i < 4u; i++) {
            let x = a[a_at + min(m + i, params.m - 1u) * params.a_m + k * params.a_k];
            sum[i] = fma(vec4<f32>(x), y, sum[i]);
        }
    }
    for (var i = 0u; i < 4u; i++) {
        for (var j = 0u; j < 4u; j++) {
            if (m + i < params.m && n + j < params.n) {
                c[c_at + (m + i) * params.c_m + (n + j) * params.c_n] = params.scale * sum[i][j];
            }
        }
    }
}
